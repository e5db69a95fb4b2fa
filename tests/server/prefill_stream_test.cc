// Tests what a consumer that keeps the protocol receives.
#include <algorithm>
#include <map>

#include "gmock/gmock.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

class PrefillStream : public ServerFixture {};

TEST_F(PrefillStream, BringsAcceptedProgressFramesAndResultInOrder) {
  StartServer();
  const StreamContents contents = Prefill(PromptOf(100, "in-order"));
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();

  ASSERT_TRUE(contents.events.front().has_accepted());
  const v1::Accepted& accepted = contents.events.front().accepted();
  EXPECT_EQ(accepted.request_id(), "in-order");
  EXPECT_EQ(accepted.num_lanes(), 1);
  EXPECT_EQ(accepted.queue_position(), 0);
  EXPECT_EQ(accepted.layout().model_fingerprint(), engine_->info().fingerprint);
  EXPECT_EQ(accepted.layout().dtype(), v1::DTYPE_BF16);
  EXPECT_EQ(accepted.layout().order(), v1::KV_ORDER_NHD);
  EXPECT_EQ(accepted.layout().block_tokens(), 16);
  EXPECT_EQ(accepted.layout().num_blocks(), 7);
  EXPECT_EQ(accepted.layout().num_heads(), 2);
  EXPECT_TRUE(accepted.layout().keys_rotated());

  uint32_t layers_announced = 0;
  for (const auto& event : contents.events) {
    if (event.has_progress()) {
      EXPECT_EQ(event.progress().num_layers(), 4);
      layers_announced = std::max(layers_announced, event.progress().layers_computed());
    } else if (event.has_kv_frame()) {
      EXPECT_LT(event.kv_frame().layer(), layers_announced);
    }
  }
  EXPECT_EQ(layers_announced, 4);
  ExpectWholeCache(contents.frames(), accepted.layout());

  ASSERT_NE(contents.result(), nullptr);
  const v1::PrefillResult& result = *contents.result();
  EXPECT_EQ(result.first_token().token_id(), 100);  // the last token is 99
  EXPECT_EQ(result.num_tokens(), 100);
  EXPECT_EQ(result.kv_frames(), contents.frames().size());
  EXPECT_EQ(result.kv_bytes(), 4 * 7 * 2 * 16 * 2 * 64 * 2);
  EXPECT_EQ(result.frames_per_lane_size(), 1);
  EXPECT_EQ(result.policy(), v1::ATTENTION_POLICY_DENSE);  // auto, and the prompt is short
  EXPECT_EQ(result.total().dense_heads(), 16);
  EXPECT_DOUBLE_EQ(result.total().density(), 1.0);
  EXPECT_EQ(result.layers_size(), 0);
  EXPECT_EQ(engine_->last_tokens().size(), 100);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(PrefillStream, GivesALayersFramesAwayWhileLaterLayersCompute) {
  StartServer();
  engine_->HoldAfter(1);
  OpenStream call(*stub_, PromptOf(64));
  const v1::KvFrame frame = call.ReadUntil(v1::PrefillEvent::kKvFrame).kv_frame();
  EXPECT_EQ(frame.layer(), 0);
  EXPECT_EQ(frame.layers_computed(), 1);
  EXPECT_EQ(engine_->layers_run(), 1);
  engine_->HoldAfter(-1);
  EXPECT_NE(call.Rest().result(), nullptr);
}

struct LayoutCase {
  uint32_t block_tokens;
  v1::KvOrder order;
  v1::DType dtype;
  uint32_t first_head, num_heads, first_block;
  int num_tokens;
  v1::KvScales scales = v1::KV_SCALES_UNSPECIFIED;
};

class EveryLayout : public PrefillStream, public ::testing::WithParamInterface<LayoutCase> {};

TEST_P(EveryLayout, ArrivesWholeAndAsAskedFor) {
  StartServer();
  const LayoutCase& c = GetParam();
  v1::PrefillRequest request = PromptOf(c.num_tokens);
  request.mutable_layout()->set_block_tokens(c.block_tokens);
  request.mutable_layout()->set_order(c.order);
  request.mutable_layout()->set_dtype(c.dtype);
  request.mutable_layout()->set_first_head(c.first_head);
  request.mutable_layout()->set_num_heads(c.num_heads);
  request.mutable_layout()->set_first_block(c.first_block);
  request.mutable_layout()->set_scales(c.scales);
  const StreamContents contents = Prefill(request);
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  const v1::KvLayout& layout = contents.events.front().accepted().layout();
  EXPECT_EQ(layout.block_tokens(), c.block_tokens);
  EXPECT_EQ(layout.order(), c.order);
  EXPECT_EQ(layout.dtype(), c.dtype);
  EXPECT_EQ(layout.scales(), c.dtype == v1::DTYPE_FP8_E4M3 && c.scales == v1::KV_SCALES_UNSPECIFIED
                                 ? v1::KV_SCALES_PER_TOKEN
                                 : c.scales);
  EXPECT_EQ(layout.first_head(), c.first_head);
  EXPECT_EQ(layout.num_heads(), c.num_heads == 0 ? 2 - c.first_head : c.num_heads);
  ExpectWholeCache(contents.frames(), layout);
  ASSERT_NE(contents.result(), nullptr);
  EXPECT_EQ(contents.result()->kv_frames(), contents.frames().size());
}

INSTANTIATE_TEST_SUITE_P(
    Layouts, EveryLayout,
    ::testing::Values(LayoutCase{16, v1::KV_ORDER_NHD, v1::DTYPE_BF16, 0, 0, 0, 1},
                      LayoutCase{32, v1::KV_ORDER_HND, v1::DTYPE_FP16, 1, 1, 0, 33},
                      LayoutCase{64, v1::KV_ORDER_NHD, v1::DTYPE_FP32, 0, 1, 3, 1000},
                      LayoutCase{128, v1::KV_ORDER_HND, v1::DTYPE_FP32, 1, 0, 0, 5000},
                      LayoutCase{16, v1::KV_ORDER_NH2D, v1::DTYPE_BF16, 0, 0, 1, 333},
                      LayoutCase{64, v1::KV_ORDER_HN2D, v1::DTYPE_FP16, 1, 1, 0, 1000},
                      // The consumer holds every block already, so it gets a result and no KV.
                      LayoutCase{16, v1::KV_ORDER_NHD, v1::DTYPE_BF16, 0, 0, 7, 100},
                      LayoutCase{16, v1::KV_ORDER_NHD, v1::DTYPE_FP8_E4M3, 0, 0, 0, 1},
                      LayoutCase{64, v1::KV_ORDER_HND, v1::DTYPE_FP8_E4M3, 1, 1, 3, 1000,
                                 v1::KV_SCALES_PER_TOKEN},
                      LayoutCase{128, v1::KV_ORDER_HND, v1::DTYPE_FP8_E4M3, 0, 0, 0, 5000,
                                 v1::KV_SCALES_PER_BLOCK},
                      LayoutCase{16, v1::KV_ORDER_NH2D, v1::DTYPE_FP8_E4M3, 0, 1, 2, 333,
                                 v1::KV_SCALES_PER_BLOCK},
                      LayoutCase{32, v1::KV_ORDER_HN2D, v1::DTYPE_FP8_E4M3, 0, 0, 1, 3000,
                                 v1::KV_SCALES_PER_TOKEN}));

TEST_F(PrefillStream, CutsALayerIntoFramesOfTheConfiguredSize) {
  StartServer();
  v1::PrefillRequest request = PromptOf(4096);  // 4 MiB a layer
  request.mutable_layout()->set_dtype(v1::DTYPE_FP32);
  const StreamContents contents = Prefill(request);
  ASSERT_TRUE(contents.status.ok());
  EXPECT_EQ(contents.frames().size(), 4 * 4);
  for (const auto& frame : contents.frames()) EXPECT_EQ(frame.payload().size(), 1 << 20);
}

TEST_F(PrefillStream, ResolvesPolicyAndThresholdsFromServerAndRequest) {
  options_.attention.gamma = 0.8f;
  options_.attention.crossover_tokens = 50;
  StartServer();
  v1::PrefillRequest request = PromptOf(60);
  request.mutable_attention()->set_tau(0.3f);
  request.set_layer_stats(true);
  const StreamContents contents = Prefill(request);
  ASSERT_NE(contents.result(), nullptr);
  EXPECT_EQ(contents.result()->policy(), v1::ATTENTION_POLICY_SHARE);
  EXPECT_EQ(contents.result()->layers_size(), 4);
  EXPECT_EQ(contents.result()->layers(3).layer(), 3);
  EXPECT_EQ(contents.result()->total().shared_heads(), 12);
  EXPECT_DOUBLE_EQ(contents.result()->total().density(), 0.25);
  EXPECT_EQ(engine_->last_attention().gamma, 0.8f);
  EXPECT_EQ(engine_->last_attention().tau, 0.3f);
}

TEST_F(PrefillStream, ARequestThatNamesGammaAloneMeansVerticalSlashToo) {
  options_.attention.vertical_slash_gamma = 0.5f;
  StartServer();
  v1::PrefillRequest request = PromptOf(60);
  ASSERT_TRUE(Prefill(request).status.ok());
  EXPECT_EQ(engine_->last_attention().vertical_slash_gamma, 0.5f);
  request.mutable_attention()->set_gamma(0.9f);
  ASSERT_TRUE(Prefill(request).status.ok());
  EXPECT_EQ(engine_->last_attention().vertical_slash_gamma, std::nullopt);
  request.mutable_attention()->set_vertical_slash_gamma(0.7f);
  ASSERT_TRUE(Prefill(request).status.ok());
  EXPECT_EQ(engine_->last_attention().gamma, 0.9f);
  EXPECT_EQ(engine_->last_attention().vertical_slash_gamma, 0.7f);
}

TEST_F(PrefillStream, ReportsTheRecallOfAuditedRequests) {
  StartServer();
  v1::PrefillRequest request = PromptOf(60);
  request.mutable_attention()->set_policy(v1::ATTENTION_POLICY_SHARE);
  EXPECT_FALSE(Prefill(request).result()->total().has_recall());
  request.mutable_attention()->set_recall_audit_rows(3);
  request.set_layer_stats(true);
  const StreamContents contents = Prefill(request);
  ASSERT_NE(contents.result(), nullptr);
  EXPECT_EQ(engine_->last_attention().recall_audit_rows, 3);
  const v1::RecallAudit& audit = contents.result()->total().recall();
  EXPECT_FALSE(audit.has_vertical_slash());
  EXPECT_FALSE(audit.has_baseline());
  EXPECT_EQ(audit.audit_us(), 4 * 500);
  EXPECT_EQ(audit.shared().heads_size(), 4 * 3);
  EXPECT_NEAR(audit.shared().mean(), 0.76, 1e-6);
  EXPECT_NEAR(audit.shared().fifth_percentile(), 0.6, 1e-6);
  EXPECT_NEAR(audit.shared().lowest(), 0.6, 1e-6);
  EXPECT_EQ(audit.shared().lowest_layer(), 3);
  EXPECT_EQ(audit.shared().lowest_head(), 1);
  EXPECT_NEAR(contents.result()->layers(0).recall().shared().lowest(), 0.9, 1e-6);

  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_recall_audits_total") == 1; }));
  EXPECT_EQ(Metric("prefilld_attention_recall_count{kind=\"shared\"}"), 12);
  EXPECT_EQ(Metric("prefilld_attention_recall_bucket{kind=\"shared\",le=\"0.75\"}"), 6);
  EXPECT_NEAR(Metric("prefilld_attention_recall_lowest{kind=\"shared\"}"), 0.6, 1e-6);
  EXPECT_NEAR(Metric("prefilld_recall_audit_seconds_total"), 0.002, 1e-9);
}

TEST_F(PrefillStream, AuditsTheShareOfRequestsThatTheOperatorSet) {
  options_.recall_audit = {.fraction = 1.0, .rows = 5};
  StartServer();
  v1::PrefillRequest request = PromptOf(60);
  request.mutable_attention()->set_policy(v1::ATTENTION_POLICY_SHARE);
  EXPECT_TRUE(Prefill(request).result()->total().has_recall());
  EXPECT_EQ(engine_->last_attention().recall_audit_rows, 5);
  request.mutable_attention()->set_recall_audit_rows(0);  // its own word counts
  EXPECT_FALSE(Prefill(request).result()->total().has_recall());
}

TEST_F(PrefillStream, SamplesTheFirstTokenWithItsLogProbabilities) {
  StartServer();
  v1::PrefillRequest request = PromptOf(10);
  request.mutable_sampling()->set_top_logprobs(2);
  const StreamContents contents = Prefill(request);
  ASSERT_NE(contents.result(), nullptr);
  const v1::SampledToken& token = contents.result()->first_token();
  EXPECT_EQ(token.token_id(), 10);
  ASSERT_EQ(token.top_logprobs_size(), 2);
  EXPECT_EQ(token.top_logprobs(0).token_id(), 10);
  EXPECT_LT(token.logprob(), 0);
}

TEST_F(PrefillStream, NamesRequestsThatHaveNoName) {
  StartServer();
  const std::string first = Prefill(PromptOf(1)).events.front().accepted().request_id();
  const std::string second = Prefill(PromptOf(1)).events.front().accepted().request_id();
  EXPECT_FALSE(first.empty());
  EXPECT_NE(first, second);
}

TEST_F(PrefillStream, NeverHoldsMoreLayersThanTheEngineHasSlots) {
  engine_options_.num_layers = 12;
  StartServer();
  ASSERT_TRUE(Prefill(PromptOf(2000)).status.ok());
  EXPECT_LE(engine_->most_held(), engine_options_.kv_slots);
}

TEST_F(PrefillStream, TellsWhatItRunsAndHowLongItsQueueIs) {
  options_.queue_capacity = 7;
  StartServer();
  engine_->HoldAfter(0);
  OpenStream running(*stub_, PromptOf(10));
  running.ReadUntil(v1::PrefillEvent::kAccepted);
  // Otherwise both might share a pass.
  EXPECT_TRUE(Eventually([this] { return engine_->started() == 1; }));
  OpenStream waiting(*stub_, PromptOf(20));
  const auto accepted = waiting.ReadUntil(v1::PrefillEvent::kAccepted).accepted();
  EXPECT_EQ(accepted.queue_position(), 1);

  v1::ServerInfo info;
  const auto ask = [&] {
    grpc::ClientContext context;
    EXPECT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
    return info.running_requests() == 1 && info.queued_requests() == 1;
  };
  EXPECT_TRUE(Eventually(ask));
  EXPECT_EQ(info.queued_tokens(), 20);
  EXPECT_EQ(info.queue_capacity(), 7);
  EXPECT_EQ(info.model_name(), "fake");
  EXPECT_EQ(info.num_layers(), 4);
  EXPECT_EQ(info.vocab_size(), 256);
  EXPECT_EQ(info.native_dtype(), v1::DTYPE_BF16);
  EXPECT_EQ(info.default_policy(), v1::ATTENTION_POLICY_AUTO);
  EXPECT_EQ(info.allowed_policies_size(), 4);
  EXPECT_EQ(info.eos_token_ids_size(), 1);
  EXPECT_TRUE(Eventually([&] { return Metric("prefilld_queued_tokens") == 20; }));
  EXPECT_EQ(Metric("prefilld_queued_tokens_limit"), 8 << 20);  // eight prompts of the longest

  engine_->HoldAfter(-1);
  EXPECT_NE(running.Rest().result(), nullptr);
  EXPECT_NE(waiting.Rest().result(), nullptr);
}

TEST_F(PrefillStream, CountsWhatItDid) {
  StartServer();
  ASSERT_TRUE(Prefill(PromptOf(100)).status.ok());
  EXPECT_TRUE(EverythingIsFree());
  EXPECT_EQ(Metric("prefilld_requests_total{outcome=\"ok\"}"), 1);
  EXPECT_EQ(Metric("prefilld_time_to_first_token_seconds_count{length=\"0-1k\",policy=\"dense\"}"),
            1);
  EXPECT_EQ(Metric("prefilld_steps_total"), 4);
  EXPECT_EQ(Metric("prefilld_step_tokens_total"), 400);
  EXPECT_EQ(Metric("prefilld_heads_total{kind=\"dense\"}"), 16);
  EXPECT_EQ(Metric("prefilld_kv_frames_total{lane=\"0\"}"), 4);
  EXPECT_EQ(Metric("prefilld_kv_bytes_total{lane=\"0\"}"), 4 * 7 * 2 * 16 * 2 * 64 * 2);
  EXPECT_EQ(Metric("prefilld_policy_requests_total{policy=\"dense\"}"), 1);
  EXPECT_EQ(Metric("prefilld_policy_fallbacks_total"), 1);  // auto ran dense
  EXPECT_EQ(Metric("prefilld_device_memory_bytes"), 12345);
  EXPECT_EQ(Metric("prefilld_resident_tokens"), 678);
  EXPECT_EQ(Metric("prefilld_resident_tokens_limit"), 9000);
  EXPECT_EQ(Metric("prefilld_staging_capacity_bytes"), 8 << 20);
  EXPECT_EQ(Metric("prefilld_ready"), 1);
  EXPECT_EQ(Metric("prefilld_live"), 1);
}

}  // namespace
}  // namespace prefilld::server
