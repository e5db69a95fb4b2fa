// Tests that prompts that take turns, layer by layer in any order, give bit for bit what each gives
// alone.
//
//   interleaved_prompts_test [--device=cpu|cuda]
#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/prefill_engine.h"
#include "tests/model/device_flag.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"
#include "tests/model/request_run.h"

namespace prefilld::model {
namespace {

using ::testing::HasSubstr;

// Runs the steps of all requests in an order that depends on the seed.
std::vector<Outcome> InTurns(PrefillEngine& engine, const std::vector<Request>& requests,
                             uint64_t seed) {
  std::vector<std::unique_ptr<Runner>> runs;
  for (const Request& request : requests) runs.push_back(std::make_unique<Runner>(engine, request));
  std::vector<Runner*> open;
  for (const auto& run : runs) open.push_back(run.get());
  std::mt19937_64 random(seed);
  while (!open.empty() && !::testing::Test::HasFatalFailure()) {
    Runner& run = *open[random() % open.size()];
    if (run.unreleased() > 0 && random() % 3 == 0) {
      run.PackOldest();
    } else {
      run.Step();
    }
    open.erase(std::remove_if(open.begin(), open.end(), [](Runner* r) { return r->done(); }),
               open.end());
  }
  std::vector<Outcome> outcomes;
  for (const auto& run : runs) outcomes.push_back(run->outcome);
  return outcomes;
}

// There are several shuffles, so that on a GPU short layers are launched, recorded and replayed for
// every state.
void ExpectEachAsAlone(PrefillEngine& engine, const std::vector<Request>& requests) {
  std::vector<Outcome> alone;
  for (const Request& request : requests) alone.push_back(Alone(engine, request));
  for (uint64_t seed = 0; seed < 4; ++seed) {
    SCOPED_TRACE(testing::Message() << "seed " << seed);
    const std::vector<Outcome> outcomes = InTurns(engine, requests, seed);
    for (size_t i = 0; i < requests.size(); ++i) {
      SCOPED_TRACE(testing::Message() << "request " << i);
      ExpectSame(outcomes[i], alone[i]);
    }
  }
}

AttentionOptions Sparse(AttentionPolicy policy) {
  AttentionOptions options = Share();
  options.policy = policy;
  return options;
}

class InterleavedPrompts : public ::testing::Test {
 protected:
  InterleavedPrompts() {
    checkpoint_.WriteFile("head_clusters.json", ClusterFile(checkpoint_.config(), /*alone=*/false));
    EngineOptions options = CpuEngineOptions(checkpoint_.dir(), 1500);
    options.device = DeviceFlag();
    options.block_tokens = 64;
    options.max_batch_tokens = 1024;
    options.baselines = true;
    options.long_prompts = 3;
    options.short_prompts = 2;
    engine_ = NewEngine(options);
  }

  Request One(int64_t length, const AttentionOptions& attention, bool logprobs = false) {
    return requests_.One(length, attention, logprobs);
  }
  Request Batch(const std::vector<int64_t>& lengths, bool logprobs = false) {
    return requests_.Batch(lengths, logprobs);
  }

  const RandomCheckpoint checkpoint_;
  std::unique_ptr<PrefillEngine> engine_;
  RequestMaker requests_{checkpoint_.config().vocab_size};
};

TEST_F(InterleavedPrompts, DensePromptsOfOneLength) {
  ExpectEachAsAlone(*engine_, {One(1300, DenseAttention()), One(1300, DenseAttention())});
}

TEST_F(InterleavedPrompts, DensePromptsShortAndLong) {
  ExpectEachAsAlone(*engine_,
                    {One(1300, DenseAttention(), /*logprobs=*/true), One(1, DenseAttention()),
                     One(700, DenseAttention(), /*logprobs=*/true), One(128, DenseAttention()),
                     One(129, DenseAttention())});
}

TEST_F(InterleavedPrompts, PivotsOfOneCluster) {
  const std::vector<Request> requests = {One(1300, Share()), One(1300, Share()),
                                         One(900, Share(), /*logprobs=*/true)};
  for (const Request& request : requests) {
    const Outcome outcome = Alone(*engine_, request);
    EXPECT_EQ(outcome.heads[0], (std::vector<int>{0, 1, 3, 0, 0, 0, 0})) << "its own pivot";
    EXPECT_EQ(outcome.heads[1], (std::vector<int>{0, 0, 4, 0, 0, 0, 0}))
        << "the same in the next layer";
    EXPECT_LT(outcome.density[1], 0.8);
  }
  ExpectEachAsAlone(*engine_, requests);
}

TEST_F(InterleavedPrompts, EveryPolicyBesideTheOthers) {
  ExpectEachAsAlone(
      *engine_, {One(1300, Share()), One(1200, Sparse(AttentionPolicy::kVerticalSlash)),
                 One(900, Sparse(AttentionPolicy::kBaselineQueryAware)),
                 One(800, Sparse(AttentionPolicy::kBaselineRandom)), One(1100, DenseAttention())});
}

TEST_F(InterleavedPrompts, BatchesBesideLongOnes) {
  ExpectEachAsAlone(*engine_,
                    {One(1300, Share()), Batch({100, 128, 1, 70}), One(1250, DenseAttention()),
                     Batch({5, 100, 40, 128}, /*logprobs=*/true)});
}

TEST_F(InterleavedPrompts, AuditsOfTheirRecall) {
  AttentionOptions audited = Share();
  audited.recall_audit_rows = 3;
  ExpectEachAsAlone(*engine_, {One(1300, audited), One(1000, Share())});
}

TEST_F(InterleavedPrompts, RotationsOfTheirOwn) {
  ModelConfig config = SmallRandomConfig();
  config.rope.kind = RopeKind::kDynamicNtk;
  config.rope.factor = 4.0;
  config.rope.original_max_positions = config.max_positions = 256;
  const RandomCheckpoint checkpoint(config);
  EngineOptions options = CpuEngineOptions(checkpoint.dir(), 1000);
  options.device = DeviceFlag();
  const auto engine = NewEngine(options);
  ExpectEachAsAlone(*engine, {One(200, DenseAttention()), One(900, DenseAttention()),
                              One(600, DenseAttention(), /*logprobs=*/true)});
}

TEST_F(InterleavedPrompts, OneThatEndsMidwayLeavesNoTraceInItsSuccessorOrNeighbour) {
  for (const AttentionOptions& attention : {DenseAttention(), Share()}) {
    const Request staying = One(1300, attention), leaving = One(1400, attention);
    const Request coming = One(1350, attention);
    const Outcome staying_alone = Alone(*engine_, staying);
    const Outcome coming_alone = Alone(*engine_, coming);
    for (int layers = 0; layers < 4; ++layers) {
      Runner neighbour(*engine_, staying);
      neighbour.Step();
      {
        Runner abandoned(*engine_, leaving);
        for (int layer = 0; layer < layers; ++layer) {
          abandoned.RunLayer();
          neighbour.Step();
        }
      }
      Runner successor(*engine_, coming);
      while (!successor.done() && !HasFatalFailure()) {
        successor.Step();
        if (!neighbour.done()) neighbour.Step();
      }
      while (!neighbour.done() && !HasFatalFailure()) neighbour.Step();
      ExpectSame(neighbour.outcome, staying_alone);
      ExpectSame(successor.outcome, coming_alone);
    }
  }
}

// A consumer that takes nothing holds back its own prompt and no other.
TEST_F(InterleavedPrompts, SlotsThatAreHeldDelayTheirOwnPromptAlone) {
  const Request slow = One(700, DenseAttention()), fast = One(700, DenseAttention());
  const Outcome slow_alone = Alone(*engine_, slow);
  const Outcome fast_alone = Alone(*engine_, fast);
  Runner held(*engine_, slow);
  for (int i = 0; i < engine_->kv_slots(); ++i) held.RunLayer();
  EXPECT_EQ(held.sequence().RunLayer().status().code(), absl::StatusCode::kFailedPrecondition);
  Runner other(*engine_, fast);
  while (!other.done() && !HasFatalFailure()) other.Step();
  ExpectSame(other.outcome, fast_alone);
  while (!held.done() && !HasFatalFailure()) held.Step();
  ExpectSame(held.outcome, slow_alone);
}

// This test computes nothing. Where layers are recorded, a short dense prompt takes whole blocks of
// 128 tokens, so the refusal of 10 tokens names 128.
TEST(PlacesOfPrompts, TheSmallestOneThatIsFreeAndLargeEnoughIsTaken) {
  ModelConfig config = SmallRandomConfig();
  config.max_positions = 20000;
  const RandomCheckpoint checkpoint(config);
  EngineOptions options = CpuEngineOptions(checkpoint.dir(), 10000);
  options.device = DeviceFlag();
  options.long_prompts = 1;
  options.short_prompts = 1;
  const auto engine = NewEngine(options);
  const auto start = [&](int64_t length) {
    return engine->Start(RandomTokens(length, config.vocab_size), DenseAttention());
  };
  auto in_short = start(4096);
  ASSERT_TRUE(in_short.ok()) << in_short.status();
  auto in_long = start(9000);
  ASSERT_TRUE(in_long.ok()) << "the short prompt has left the long place: " << in_long.status();
  const int taken = options.device == DeviceChoice::kCuda ? 128 : 10;
  const absl::Status full = start(10).status();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(full.message(),
              HasSubstr(absl::StrCat(taken, " tokens: other prompts have all 2 places")));
  EXPECT_THAT(start(9000).status().message(), HasSubstr("all 1 places that hold so many, of 2"));

  in_long->reset();
  auto in_long_for_want_of_a_short = start(10);
  ASSERT_TRUE(in_long_for_want_of_a_short.ok()) << in_long_for_want_of_a_short.status();
  in_short->reset();
  EXPECT_EQ(start(9000).status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(start(10).ok());
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) { return prefilld::model::RunTestsOnDevice(argc, argv); }
