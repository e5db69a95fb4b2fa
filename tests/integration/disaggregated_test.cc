// Tests that prefill in one process and decode in another give the tokens of a single process.
#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "client/prefill_client.h"
#include "client/transfer_check.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/decode/decoder.h"
#include "model/decode/sampling.h"
#include "nlohmann/json.hpp"
#include "proto/wire/kv_layout.h"
#include "tests/integration/child_process.h"
#include "tests/integration/generate_client.h"
#include "tests/integration/greedy_reference.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::Progress;
using ::testing::Each;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::Truly;

constexpr int kPromptTokens = 301;  // ends inside a block of every size
constexpr int kNewTokens = 12;

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_kv_heads = 4;  // halves of the heads have two each
  config.num_heads = 8;
  return config;
}

class Disaggregated : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    checkpoint_ = new model::RandomCheckpoint(Config(), 7);
    prompt_ = new std::vector<uint32_t>(model::RandomTokens(kPromptTokens, Config().vocab_size, 3));
    reference_ =
        new std::vector<uint32_t>(GreedyReference(checkpoint_->dir(), *prompt_, kNewTokens));
    prefilld_ = new ServerProcess(
        "prefilld", {"--model=" + checkpoint_->dir(), "--device=cpu", "--cpu_threads=2",
                     "--max_prompt_tokens=4096", "--deliver_to_allow=127.0.0.1:*"});
  }
  static void TearDownTestSuite() {
    delete prefilld_;
    delete reference_;
    delete prompt_;
    delete checkpoint_;
  }

  static ServerProcess StartWorker(std::vector<std::string> flags) {
    flags.insert(flags.end(),
                 {"--model=" + checkpoint_->dir(), "--device=cpu", "--cpu_threads=2",
                  "--prefill_address=" + prefilld_->address(), "--kv_pool_tokens=2048"});
    return ServerProcess("prefilld-decode-worker", flags);
  }

  static model::RandomCheckpoint* checkpoint_;
  static std::vector<uint32_t>* prompt_;
  static std::vector<uint32_t>* reference_;
  static ServerProcess* prefilld_;
};

model::RandomCheckpoint* Disaggregated::checkpoint_ = nullptr;
std::vector<uint32_t>* Disaggregated::prompt_ = nullptr;
std::vector<uint32_t>* Disaggregated::reference_ = nullptr;
ServerProcess* Disaggregated::prefilld_ = nullptr;

struct Layout {
  int block_tokens;
  const char* order;
};

void PrintTo(const Layout& layout, std::ostream* os) {
  *os << layout.block_tokens << " " << layout.order;
}

class EveryLayout : public Disaggregated, public ::testing::WithParamInterface<Layout> {};

TEST_P(EveryLayout, TheWorkersTokensAreThoseOfOneProcess) {
  // One order goes over one lane, the other over several.
  const bool is_nhd = std::string(GetParam().order) == "nhd";
  ServerProcess worker = StartWorker({absl::StrCat("--kv_block_tokens=", GetParam().block_tokens),
                                      absl::StrCat("--kv_order=", GetParam().order),
                                      is_nhd ? "--lanes=1" : "--lanes=3"});
  const Generation generation = Generate(worker.address(), DenseRequest(*prompt_, kNewTokens));
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  EXPECT_THAT(generation.tokens, ElementsAreArray(*reference_));
  const uint64_t blocks = (kPromptTokens + GetParam().block_tokens - 1) / GetParam().block_tokens;
  const model::ModelConfig config = Config();
  EXPECT_EQ(generation.result.kv_bytes(), 2 * blocks * GetParam().block_tokens * config.num_layers *
                                              config.num_kv_heads * config.head_dim * 4);
}

INSTANTIATE_TEST_SUITE_P(BlockAndOrder, EveryLayout,
                         ::testing::Values(Layout{16, "nhd"}, Layout{16, "hnd"}, Layout{32, "nhd"},
                                           Layout{32, "hnd"}, Layout{64, "nhd"}, Layout{64, "hnd"},
                                           Layout{128, "nhd"}, Layout{128, "hnd"}));

// Stores the received cache into a decoder of this process, for the heads that the layout names.
class DecoderSink : public client::KvSink {
 public:
  DecoderSink(model::Decoder* decoder, const std::vector<int32_t>& block_table)
      : decoder_(decoder), block_table_(block_table) {}

  absl::Status OnAccepted(const Accepted& accepted) override {
    layout_ = accepted.layout();
    return absl::OkStatus();
  }
  absl::Status OnProgress(const Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    const size_t tensor_bytes = frame.payload.size() / 2;
    const absl::Span<const int32_t> blocks(block_table_.data() + frame.first_block,
                                           frame.num_blocks);
    for (const bool is_value : {false, true}) {
      const absl::Status stored = decoder_->StoreBlocks(
          static_cast<int>(frame.layer), is_value, blocks, static_cast<int>(layout_.first_head()),
          static_cast<int>(layout_.num_heads()),
          frame.payload.Part(is_value ? tensor_bytes : 0, tensor_bytes));
      if (!stored.ok()) return stored;
    }
    return absl::OkStatus();
  }

 private:
  model::Decoder* const decoder_;
  const std::vector<int32_t>& block_table_;
  ::prefill::v1::KvLayout layout_;
};

class HalvesOfTheHeads : public Disaggregated, public ::testing::WithParamInterface<Layout> {};

TEST_P(HalvesOfTheHeads, JoinedInOneDecoderTheyGiveTheTokensOfOneProcess) {
  const bool is_nhd = std::string(GetParam().order) == "nhd";
  model::DecoderOptions options;
  options.checkpoint_dir = checkpoint_->dir();
  options.device = model::DeviceChoice::kCpu;
  options.cpu_threads = 2;
  options.block_tokens = GetParam().block_tokens;
  options.order = is_nhd ? kernels::KvOrder::kNhd : kernels::KvOrder::kHnd;
  options.pool_tokens = 1024;
  const auto decoder = model::Decoder::Create(options);
  ASSERT_TRUE(decoder.ok()) << decoder.status();
  // The table runs backwards, so that a block at the wrong place shows.
  std::vector<int32_t> block_table;
  for (int32_t b = static_cast<int32_t>((*decoder)->num_pool_blocks()) - 1; b >= 0; --b) {
    block_table.push_back(b);
  }

  const auto prefill = client::PrefillClient::Create({.address = prefilld_->address()});
  uint32_t token = 0;
  for (const uint32_t first_head : {0, 2}) {
    PrefillRequest request;
    request.mutable_token_ids()->Assign(prompt_->begin(), prompt_->end());
    request.set_model_fingerprint((*decoder)->fingerprint());
    request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
    auto& layout = *request.mutable_layout();
    layout.set_block_tokens(GetParam().block_tokens);
    layout.set_order(is_nhd ? ::prefill::v1::KV_ORDER_NHD : ::prefill::v1::KV_ORDER_HND);
    layout.set_dtype(::prefill::v1::DTYPE_FP32);
    layout.set_first_head(first_head);
    layout.set_num_heads(2);
    DecoderSink sink(decoder->get(), block_table);
    const auto result = (*prefill)->Prefill(request, sink);
    ASSERT_TRUE(result.ok()) << result.status();
    token = result->first_token().token_id();
  }

  std::vector<uint32_t> tokens = {token};
  while (tokens.size() < kNewTokens) {
    const int64_t position = kPromptTokens + static_cast<int64_t>(tokens.size()) - 1;
    const auto logits = (*decoder)->Step(tokens.back(), position, kPromptTokens, block_table);
    ASSERT_TRUE(logits.ok()) << logits.status();
    tokens.push_back(model::Sample(*logits, {}, position + 1)->token_id);
  }
  EXPECT_THAT(tokens, ElementsAreArray(*reference_));
}

INSTANTIATE_TEST_SUITE_P(BlockAndOrder, HalvesOfTheHeads,
                         ::testing::Values(Layout{16, "nhd"}, Layout{128, "hnd"}));

// Puts the received cache in one order, [num_layers, 2, num_tokens, num_heads, head_dim].
class GatherSink : public client::KvSink {
 public:
  absl::Status OnAccepted(const Accepted& accepted) override {
    layout_ = accepted.layout();
    values_.assign(size_t{2} * layout_.num_layers() * layout_.num_tokens() * row(), NAN);
    return absl::OkStatus();
  }
  absl::Status OnProgress(const Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    std::vector<uint8_t> scratch;
    const auto* payload = reinterpret_cast<const float*>(frame.payload.Contiguous(scratch));
    const wire::PayloadStrides strides = wire::StridesOf(layout_, frame.num_blocks);
    const int64_t first_token = int64_t{frame.first_block} * layout_.block_tokens();
    const int64_t tokens = std::min(int64_t{frame.num_blocks} * layout_.block_tokens(),
                                    layout_.num_tokens() - first_token);
    for (int64_t tensor = 0; tensor < 2; ++tensor) {
      for (int64_t token = 0; token < tokens; ++token) {
        for (int64_t head = 0; head < layout_.num_heads(); ++head) {
          const float* from = payload + tensor * strides.tensor +
                              token / layout_.block_tokens() * strides.block +
                              token % layout_.block_tokens() * strides.token + head * strides.head;
          const int64_t at =
              ((2 * int64_t{frame.layer} + tensor) * layout_.num_tokens() + first_token + token) *
                  row() +
              head * layout_.head_dim();
          std::copy_n(from, layout_.head_dim(), values_.begin() + at);
        }
      }
    }
    return absl::OkStatus();
  }

  const std::vector<float>& values() const { return values_; }

 private:
  int64_t row() const { return int64_t{layout_.num_heads()} * layout_.head_dim(); }

  ::prefill::v1::KvLayout layout_;
  std::vector<float> values_;
};

TEST_F(Disaggregated, EveryOrderBringsTheSameNumbers) {
  const auto prefill = client::PrefillClient::Create({.address = prefilld_->address()});
  std::vector<float> expected;
  for (const auto order : {::prefill::v1::KV_ORDER_NHD, ::prefill::v1::KV_ORDER_HND,
                           ::prefill::v1::KV_ORDER_NH2D, ::prefill::v1::KV_ORDER_HN2D}) {
    PrefillRequest request;
    request.mutable_token_ids()->Assign(prompt_->begin(), prompt_->end());
    request.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
    request.mutable_layout()->set_order(order);
    request.mutable_layout()->set_dtype(::prefill::v1::DTYPE_FP32);
    GatherSink sink;
    const auto result = (*prefill)->Prefill(request, sink);
    ASSERT_TRUE(result.ok()) << result.status();
    if (expected.empty()) expected = sink.values();
    EXPECT_THAT(expected, Each(Truly([](float x) { return std::isfinite(x); })));
    EXPECT_TRUE(sink.values() == expected) << KvOrder_Name(order);
  }
}

TEST_F(Disaggregated, RequestsThatDecodeTogetherDoNotDisturbEachOther) {
  ServerProcess worker = StartWorker({});
  std::vector<Generation> generations(3);
  std::vector<std::thread> callers;
  for (Generation& generation : generations) {
    callers.emplace_back(
        [&] { generation = Generate(worker.address(), DenseRequest(*prompt_, kNewTokens)); });
  }
  for (std::thread& caller : callers) caller.join();
  for (const Generation& generation : generations) {
    ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
    EXPECT_THAT(generation.tokens, ElementsAreArray(*reference_));
  }
}

TEST_F(Disaggregated, APushedCacheGivesTheSameTokens) {
  ServerProcess worker = StartWorker({"--prefill_address=", "--kv_order=hnd"});
  ::prefill::v1::GenerateRequest request = DenseRequest(*prompt_, kNewTokens);
  request.set_pushed_transfer_id("transfer-1");
  // This is the router's part: once the worker waits, it has the cache computed and sent there.
  const auto prefill = client::PrefillClient::Create({.address = prefilld_->address()});
  absl::StatusOr<::prefill::v1::PrefillResult> prefilled = absl::UnknownError("not called");
  std::thread router;
  const Generation generation =
      Generate(worker.address(), request, [&](const ::prefill::v1::GenerateEvent& event, auto&) {
        if (!event.has_started()) return;
        PrefillRequest push;
        push.mutable_token_ids()->Assign(prompt_->begin(), prompt_->end());
        push.mutable_attention()->set_policy(::prefill::v1::ATTENTION_POLICY_DENSE);
        *push.mutable_layout() = event.started().kv_layout();
        push.mutable_deliver_to()->set_address(worker.address());
        push.mutable_deliver_to()->set_transfer_id("transfer-1");
        router = std::thread([&, push] {
          static const std::vector<int32_t> kNoBlocks;
          DecoderSink sink(nullptr, kNoBlocks);  // sees no frame
          prefilled = (*prefill)->Prefill(push, sink);
        });
      });
  router.join();
  ASSERT_TRUE(prefilled.ok()) << prefilled.status();
  ASSERT_TRUE(generation.status.ok()) << generation.status.error_message();
  EXPECT_THAT(generation.tokens, ElementsAreArray(*reference_));
  EXPECT_EQ(prefilled->kv_bytes(), generation.result.kv_bytes());
}

TEST_F(Disaggregated, AWorkerWithAnotherModelIsRefused) {
  const model::RandomCheckpoint other(Config(), 8);
  ServerProcess worker("prefilld-decode-worker", {"--model=" + other.dir(), "--device=cpu",
                                                  "--prefill_address=" + prefilld_->address()});
  const Generation generation = Generate(worker.address(), DenseRequest(*prompt_, kNewTokens));
  EXPECT_EQ(generation.status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_THAT(generation.status.error_message(), HasSubstr("fingerprint"));
}

TEST_F(Disaggregated, TheCommandLineShowsTokensAndTellsWhatHappened) {
  ServerProcess worker = StartWorker({});
  std::string ids;
  for (uint32_t id : *prompt_) absl::StrAppend(&ids, id, " ");
  std::string expected;
  for (uint32_t id : *reference_) absl::StrAppend(&expected, expected.empty() ? "" : " ", id);
  const std::vector<std::string> args = {
      "generate",           "--worker=" + worker.address(),
      "--token_ids=" + ids, "--policy=dense",
      "--ignore_eos",       absl::StrCat("--max_new_tokens=", kNewTokens)};
  ChildProcess plain("prefill-cli", args);
  ASSERT_EQ(plain.Wait(absl::Seconds(20)), 0) << plain.stderr_text();
  EXPECT_EQ(plain.stdout_text(), expected + "\n");
  EXPECT_THAT(plain.stderr_text(), HasSubstr("301 tokens; first token after"));

  std::vector<std::string> json_args = args;
  json_args.push_back("--json");
  ChildProcess json("prefill-cli", json_args);
  ASSERT_EQ(json.Wait(absl::Seconds(20)), 0) << json.stderr_text();
  const auto object = nlohmann::json::parse(json.stdout_text());
  EXPECT_THAT(object["token_ids"].get<std::vector<uint32_t>>(), ElementsAreArray(*reference_));
  EXPECT_EQ(object["prefill"]["policy"], "dense");
  EXPECT_EQ(object["prefill"]["density"], 1.0);
  EXPECT_EQ(object["finish_reason"], "length");

  ChildProcess info("prefill-cli", {"info", "--server=" + prefilld_->address(), "--json"});
  ASSERT_EQ(info.Wait(absl::Seconds(20)), 0) << info.stderr_text();
  EXPECT_EQ(nlohmann::json::parse(info.stdout_text())["num_kv_heads"], 4);

  ChildProcess prefill("prefill-cli", {"prefill", "--server=" + prefilld_->address(),
                                       "--token_ids=" + ids, "--lanes=2", "--block_tokens=64"});
  ASSERT_EQ(prefill.Wait(absl::Seconds(20)), 0) << prefill.stderr_text();
  EXPECT_THAT(prefill.stdout_text(), HasSubstr("layer 0 here after"));
}

TEST_F(Disaggregated, TheCommandLinesExitCodesTellFailuresApart) {
  ChildProcess usage("prefill-cli", {"generate"});
  EXPECT_EQ(usage.Wait(absl::Seconds(10)), 2);
  EXPECT_THAT(usage.stderr_text(), HasSubstr("one of --text, --text_file"));
  ChildProcess unavailable("prefill-cli", {"info", "--server=127.0.0.1:1"});
  EXPECT_EQ(unavailable.Wait(absl::Seconds(20)), 3);
  EXPECT_THAT(unavailable.stderr_text(), HasSubstr("prefill-cli: UNAVAILABLE"));
  ChildProcess refused("prefill-cli",
                       {"prefill", "--server=" + prefilld_->address(), "--token_ids=1,2,999999"});
  EXPECT_EQ(refused.Wait(absl::Seconds(20)), 2);
  EXPECT_THAT(refused.stderr_text(), HasSubstr("INVALID_ARGUMENT"));
}

}  // namespace
}  // namespace prefilld::integration
