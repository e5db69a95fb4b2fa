// Tests KV in fp8 between processes: it is as near to KV in fp32 as e4m3 can be, and the decode
// worker decodes from exactly what was sent.
#include <csignal>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/decode/decoder.h"
#include "model/decode/sampling.h"
#include "proto/wire/e4m3.h"
#include "proto/wire/kv_layout.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::DType;
using ::prefill::v1::KvLayout;
using ::prefill::v1::KvLayoutRequest;
using ::prefill::v1::KvOrder;
using ::prefill::v1::KvScales;
using ::prefill::v1::PrefillRequest;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

constexpr int kPromptTokens = 301;  // ends inside a block of every size
constexpr int kNewTokens = 12;

// Puts the received cache in one order: values, and in fp8 the scale of each.
class GatherSink : public client::KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) override {
    layout_ = accepted.layout();
    values_.assign(size_t{2} * layout_.num_layers() * layout_.num_tokens() * row(), NAN);
    scales_.assign(values_.size(), 0.0f);
    return absl::OkStatus();
  }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    std::vector<uint8_t> scratch;
    const uint8_t* payload = frame.payload.Contiguous(scratch);
    const wire::PayloadStrides strides = wire::StridesOf(layout_, frame.num_blocks);
    const wire::PayloadStrides scale_strides = wire::ScaleStridesOf(layout_, frame.num_blocks);
    const uint8_t* scales = payload + wire::ScalesOffset(layout_, frame.num_blocks);
    for (int64_t tensor = 0; tensor < 2; ++tensor) {
      for (int64_t token = 0; token < int64_t{frame.num_blocks} * layout_.block_tokens(); ++token) {
        for (int64_t head = 0; head < layout_.num_heads(); ++head) {
          const auto place = [&](const wire::PayloadStrides& s) {
            return tensor * s.tensor + token / layout_.block_tokens() * s.block +
                   token % layout_.block_tokens() * s.token + head * s.head;
          };
          Take(frame, tensor, token, head, payload, place(strides),
               scales + place(scale_strides) * 4);
        }
      }
    }
    return absl::OkStatus();
  }

  const KvLayout& layout() const { return layout_; }
  // [num_layers, 2 (K, V), num_tokens, num_heads, head_dim], both
  const std::vector<float>& values() const { return values_; }
  const std::vector<float>& scales() const { return scales_; }
  int padding_not_zero() const { return padding_not_zero_; }

 private:
  int64_t row() const { return int64_t{layout_.num_heads()} * layout_.head_dim(); }

  void Take(const wire::ReceivedFrame& frame, int64_t tensor, int64_t token, int64_t head,
            const uint8_t* payload, int64_t place, const uint8_t* scale_bytes) {
    const bool is_fp8 = wire::HasScales(layout_.dtype());
    float scale = 1.0f;
    if (is_fp8) std::memcpy(&scale, scale_bytes, sizeof(scale));
    token += int64_t{frame.first_block} * layout_.block_tokens();
    for (int64_t i = 0; i < layout_.head_dim(); ++i) {
      float value;
      if (is_fp8) {
        value = wire::E4m3Value(payload[place + i]) * scale;
      } else {
        std::memcpy(&value, payload + (place + i) * 4, sizeof(value));
      }
      if (token >= layout_.num_tokens()) {
        const bool has_scale = layout_.scales() == KvScales::KV_SCALES_PER_TOKEN && scale != 0.0f;
        if (value != 0.0f || has_scale) ++padding_not_zero_;
        continue;
      }
      const int64_t at =
          ((2 * int64_t{frame.layer} + tensor) * layout_.num_tokens() + token) * row() +
          head * layout_.head_dim() + i;
      values_[at] = value;
      scales_[at] = scale;
    }
  }

  KvLayout layout_;
  std::vector<float> values_, scales_;
  int padding_not_zero_ = 0;
};

class KvInFp8 : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    model::ModelConfig config = model::SmallRandomConfig();
    config.num_kv_heads = 4;
    config.num_heads = 8;
    checkpoint_ = new model::RandomCheckpoint(config, 7);
    prompt_ = new std::vector<uint32_t>(model::RandomTokens(kPromptTokens, config.vocab_size, 3));
    prefilld_ = new ServerProcess(
        "prefilld", {"--model=" + checkpoint_->dir(), "--device=cpu", "--cpu_threads=2",
                     "--max_prompt_tokens=4096", "--deliver_to_allow=127.0.0.1:*"});
  }
  static void TearDownTestSuite() {
    delete prefilld_;
    delete prompt_;
    delete checkpoint_;
  }

  static PrefillRequest Request(const KvLayoutRequest& layout) {
    PrefillRequest request;
    request.mutable_token_ids()->Assign(prompt_->begin(), prompt_->end());
    request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
    *request.mutable_layout() = layout;
    return request;
  }

  static KvLayoutRequest Layout(DType dtype, KvScales scales = KvScales::KV_SCALES_UNSPECIFIED) {
    KvLayoutRequest layout;
    layout.set_dtype(dtype);
    layout.set_scales(scales);
    return layout;
  }

  // Has a prompt's KV gathered by `sink`, and returns its first token.
  static uint32_t Prefill(const KvLayoutRequest& layout, GatherSink& sink) {
    const auto client = client::PrefillClient::Create({.address = prefilld_->address()});
    const auto result = (*client)->Prefill(Request(layout), sink);
    EXPECT_TRUE(result.ok()) << result.status();
    return result.ok() ? result->first_token().token_id() : 0;
  }

  // Decodes in this process from a cache of values.
  static std::vector<uint32_t> Decode(const GatherSink& cache, uint32_t first_token) {
    const KvLayout& layout = cache.layout();
    model::DecoderOptions options;
    options.checkpoint_dir = checkpoint_->dir();
    options.device = model::DeviceChoice::kCpu;
    options.cpu_threads = 2;
    options.pool_tokens = 512;
    const auto decoder = *model::Decoder::Create(options);
    std::vector<int32_t> table;
    for (int32_t b = 0; b < decoder->num_pool_blocks(); ++b) table.push_back(b);
    const size_t row = size_t{layout.num_heads()} * layout.head_dim();
    const size_t tensor = layout.num_tokens() * row;
    std::vector<float> blocks((layout.num_tokens() + 15) / 16 * 16 * row, 0.0f);
    for (uint32_t i = 0; i < 2 * layout.num_layers(); ++i) {
      std::copy_n(cache.values().begin() + static_cast<int64_t>(i * tensor), tensor,
                  blocks.begin());
      const absl::Span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(blocks.data()),
                                            blocks.size() * sizeof(float));
      const absl::Status stored = decoder->StoreBlocks(
          static_cast<int>(i / 2), i % 2 == 1,
          absl::MakeConstSpan(table).subspan(0, (layout.num_tokens() + 15) / 16), 0,
          static_cast<int>(layout.num_heads()), {bytes});
      EXPECT_TRUE(stored.ok()) << stored;
    }
    std::vector<uint32_t> tokens = {first_token};
    while (tokens.size() < kNewTokens) {
      const int64_t position = kPromptTokens + static_cast<int64_t>(tokens.size()) - 1;
      const auto logits = decoder->Step(tokens.back(), position, kPromptTokens, table);
      EXPECT_TRUE(logits.ok()) << logits.status();
      tokens.push_back(model::Sample(*logits, {}, position + 1)->token_id);
    }
    return tokens;
  }

  static ServerProcess StartWorker(std::vector<std::string> flags) {
    flags.insert(flags.end(), {"--model=" + checkpoint_->dir(), "--device=cpu", "--cpu_threads=2",
                               "--kv_pool_tokens=2048", "--kv_dtype=fp8_e4m3"});
    return ServerProcess("prefilld-decode-worker", flags);
  }

  static model::RandomCheckpoint* checkpoint_;
  static std::vector<uint32_t>* prompt_;
  static ServerProcess* prefilld_;
};

model::RandomCheckpoint* KvInFp8::checkpoint_ = nullptr;
std::vector<uint32_t>* KvInFp8::prompt_ = nullptr;
ServerProcess* KvInFp8::prefilld_ = nullptr;

TEST_F(KvInFp8, IsAsNearAsE4m3CanBeInEveryOrder) {
  GatherSink exact;
  Prefill(Layout(DType::DTYPE_FP32), exact);
  for (const KvScales scales : {KvScales::KV_SCALES_PER_TOKEN, KvScales::KV_SCALES_PER_BLOCK}) {
    std::vector<float> of_first_order;
    for (const KvOrder order : {KvOrder::KV_ORDER_NHD, KvOrder::KV_ORDER_HND,
                                KvOrder::KV_ORDER_NH2D, KvOrder::KV_ORDER_HN2D}) {
      KvLayoutRequest layout = Layout(DType::DTYPE_FP8_E4M3, scales);
      layout.set_order(order);
      layout.set_block_tokens(32);
      GatherSink fp8;
      Prefill(layout, fp8);
      EXPECT_EQ(fp8.layout().scales(), scales);
      EXPECT_EQ(fp8.padding_not_zero(), 0);
      ASSERT_EQ(fp8.values().size(), exact.values().size());
      int far = 0;
      for (size_t i = 0; i < exact.values().size(); ++i) {
        const float x = exact.values()[i];
        // Half a step: 2^-4 of a normal number, 2^-10 of the scale below those. The scale and the
        // quotient are rounded as well, by less than 2^-20 together.
        const float bound =
            std::max(std::fabs(x) * 0x1p-4f, fp8.scales()[i] * 0x1p-10f) * (1 + 0x1p-20f);
        if (!(std::fabs(fp8.values()[i] - x) <= bound)) ++far;
      }
      EXPECT_EQ(far, 0) << KvOrder_Name(order) << " " << KvScales_Name(scales);
      if (of_first_order.empty()) of_first_order = fp8.values();
      EXPECT_TRUE(fp8.values() == of_first_order) << KvOrder_Name(order);
    }
    EXPECT_FALSE(of_first_order == exact.values()) << "it was not fp8 that came";
  }
}

TEST_F(KvInFp8, ARangeOfHeadsAndOfBlocksHasTheirValues) {
  GatherSink whole, part;
  KvLayoutRequest layout = Layout(DType::DTYPE_FP8_E4M3, KvScales::KV_SCALES_PER_BLOCK);
  layout.set_order(KvOrder::KV_ORDER_HND);
  Prefill(layout, whole);
  layout.set_first_head(1);
  layout.set_num_heads(2);
  layout.set_first_block(5);
  Prefill(layout, part);
  const int64_t dim = whole.layout().head_dim();
  int different = 0;
  for (size_t i = 0; i < part.values().size(); ++i) {
    const int64_t row = static_cast<int64_t>(i) / dim;  // of [num_layers, 2, num_tokens, 2 heads]
    if (row / 2 % kPromptTokens < 5 * 16) continue;
    const int64_t same = (row / 2 * 4 + 1 + row % 2) * dim + static_cast<int64_t>(i) % dim;
    if (part.values()[i] != whole.values()[same]) ++different;
  }
  EXPECT_EQ(different, 0);
}

struct WorkerCase {
  const char* name;
  KvScales scales;
  std::vector<std::string> flags;
};

void PrintTo(const WorkerCase& c, std::ostream* os) { *os << c.name; }

class WorkerOfFp8 : public KvInFp8, public ::testing::WithParamInterface<WorkerCase> {};

TEST_P(WorkerOfFp8, DecodesFromWhatWasSent) {
  KvLayoutRequest layout = Layout(DType::DTYPE_FP8_E4M3, GetParam().scales);
  std::vector<std::string> flags = GetParam().flags;
  // With a scale for a block its size matters.
  for (const std::string& flag : flags) {
    if (flag == "--kv_block_tokens=64") layout.set_block_tokens(64);
  }
  GatherSink sent;
  const uint32_t first_token = Prefill(layout, sent);
  flags.push_back("--prefill_address=" + prefilld_->address());
  ServerProcess worker = StartWorker(flags);
  const Generation generation = Generate(worker.address(), DenseRequest(*prompt_, kNewTokens));
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  EXPECT_THAT(generation.tokens, ElementsAreArray(Decode(sent, first_token)));
  EXPECT_EQ(generation.result.kv_bytes(), static_cast<uint64_t>(wire::KvPairBytes(sent.layout())) *
                                              sent.layout().num_blocks() *
                                              sent.layout().num_layers());
}

INSTANTIATE_TEST_SUITE_P(
    Flags, WorkerOfFp8,
    ::testing::Values(
        WorkerCase{"PerToken", KvScales::KV_SCALES_PER_TOKEN, {"--lanes=1"}},
        WorkerCase{"PerTokenHnd", KvScales::KV_SCALES_PER_TOKEN, {"--kv_order=hnd", "--lanes=3"}},
        WorkerCase{"PerBlock",
                   KvScales::KV_SCALES_PER_BLOCK,
                   {"--kv_scales=per_block", "--kv_block_tokens=64", "--lanes=3"}},
        WorkerCase{"PerBlockHnd",
                   KvScales::KV_SCALES_PER_BLOCK,
                   {"--kv_scales=per_block", "--kv_order=hnd", "--lanes=1"}}),
    [](const auto& info) { return info.param.name; });

TEST_F(KvInFp8, APushedCacheIsTheSame) {
  GatherSink sent;
  const uint32_t first_token =
      Prefill(Layout(DType::DTYPE_FP8_E4M3, KvScales::KV_SCALES_PER_TOKEN), sent);
  ServerProcess worker = StartWorker({"--prefill_address="});
  ::prefill::v1::GenerateRequest request = DenseRequest(*prompt_, kNewTokens);
  request.set_pushed_transfer_id("transfer-1");
  const auto prefill = client::PrefillClient::Create({.address = prefilld_->address()});
  absl::StatusOr<::prefill::v1::PrefillResult> prefilled = absl::UnknownError("not called");
  std::thread router;
  const Generation generation =
      Generate(worker.address(), request, [&](const ::prefill::v1::GenerateEvent& event, auto&) {
        if (!event.has_started()) return;
        PrefillRequest push = Request(event.started().kv_layout());
        EXPECT_EQ(push.layout().scales(), KvScales::KV_SCALES_PER_TOKEN);
        push.mutable_deliver_to()->set_address(worker.address());
        push.mutable_deliver_to()->set_transfer_id("transfer-1");
        router = std::thread([&, push] {
          GatherSink sees_no_frame;
          prefilled = (*prefill)->Prefill(push, sees_no_frame);
        });
      });
  if (router.joinable()) router.join();
  ASSERT_TRUE(prefilled.ok()) << prefilled.status();
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  EXPECT_THAT(generation.tokens, ElementsAreArray(Decode(sent, first_token)));
}

// The blocks of a prefix that the server has kept are packed from there, and not from the device.
TEST_F(KvInFp8, ACachedPrefixHasTheSameBytes) {
  ServerProcess prefilld("prefilld",
                         {"--model=" + checkpoint_->dir(), "--device=cpu", "--cpu_threads=2",
                          "--max_prompt_tokens=4096", "--prefix_cache_bytes=268435456"});
  const auto client = client::PrefillClient::Create({.address = prefilld.address()});
  GatherSink computed;
  const PrefillRequest request =
      Request(Layout(DType::DTYPE_FP8_E4M3, KvScales::KV_SCALES_PER_BLOCK));
  ASSERT_TRUE((*client)->Prefill(request, computed).ok());
  GatherSink kept;
  const auto result = (*client)->Prefill(request, kept);
  ASSERT_TRUE(result.ok()) << result.status();
  ASSERT_EQ(result->cached_tokens(), 256u);
  const KvLayout& layout = computed.layout();
  const size_t row = size_t{layout.num_heads()} * layout.head_dim();
  int different = 0;
  for (size_t i = 0; i < computed.values().size(); ++i) {
    if (i / row % kPromptTokens < 256 && kept.values()[i] != computed.values()[i]) ++different;
  }
  EXPECT_EQ(different, 0);
}

TEST_F(KvInFp8, TheRequestsLineNamesIt) {
  ServerProcess prefilld("prefilld", {"--model=" + checkpoint_->dir(), "--device=cpu",
                                      "--cpu_threads=1", "--max_prompt_tokens=4096"});
  ChildProcess prefill("prefill-cli",
                       {"prefill", "--server=" + prefilld.address(), "--token_ids=1,2,3",
                        "--kv_dtype=fp8_e4m3", "--kv_scales=per_block"});
  ASSERT_EQ(prefill.Wait(absl::Seconds(30)), 0) << prefill.stderr_text();
  prefilld.Signal(SIGTERM);
  ASSERT_TRUE(prefilld.Wait(absl::Seconds(30)).has_value());
  EXPECT_THAT(prefilld.stderr_text(), HasSubstr("kv_dtype=fp8_e4m3 kv_scales=per_block"));
}

}  // namespace
}  // namespace prefilld::integration
