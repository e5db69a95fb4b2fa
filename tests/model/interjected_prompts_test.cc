// Tests that short prompts that are computed at the points inside a layer of a long one give bit
// for bit what each gives alone, that they leave the long one as it is, and that each is told its
// own time.
//
//   interjected_prompts_test [--device=cpu|cuda]
#include <chrono>
#include <memory>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/attention.h"
#include "model/prefill/prefill_engine.h"
#include "model/sparse/layer_pauses.h"
#include "tests/model/device_flag.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"
#include "tests/model/request_run.h"

namespace prefilld::model {
namespace {

using ::testing::ElementsAre;

constexpr int64_t kTileTokens = 256;

// From this length on there are points between groups of heads.
int64_t LongTokens() { return DeviceFlag() == DeviceChoice::kCuda ? 65536 : 4096; }
constexpr int kHeadDim = 64;

ModelConfig ConfigForLongTokens() {
  ModelConfig config = SmallRandomConfig();
  config.max_positions = LongTokens();
  return config;
}

// No head shares, so all of them are scored.
AttentionOptions Scored() {
  AttentionOptions options = Share();
  options.coverage = 0.0f;
  return options;
}

AttentionOptions VerticalSlash() {
  AttentionOptions options = Share();
  options.policy = AttentionPolicy::kVerticalSlash;
  return options;
}

class InterjectedPrompts : public ::testing::Test {
 protected:
  InterjectedPrompts() {
    checkpoint_.WriteFile("head_clusters.json", ClusterFile(checkpoint_.config(), /*alone=*/false));
    EngineOptions options = CpuEngineOptions(checkpoint_.dir(), LongTokens());
    options.device = DeviceFlag();
    options.block_tokens = 64;
    options.tile_tokens = kTileTokens;
    options.interject_tokens = 384;
    // The two heads of a group that are dense have as much as LongTokens()^2 * kHeadDim. A part has
    // less than half of it, so that these are three parts.
    options.most_attention_work = LongTokens() * LongTokens() / 5 * 2 * kHeadDim;
    options.max_batch_tokens = 1024;
    options.long_prompts = 2;
    options.short_prompts = 2;
    engine_ = NewEngine(options);
  }

  std::vector<Request> Shorts() {
    return {requests_.One(200, DenseAttention(), /*logprobs=*/true), requests_.Batch({20, 30}),
            requests_.One(384, DenseAttention()), requests_.One(1, DenseAttention())};
  }
  std::vector<Request> Longs() {
    return {requests_.One(LongTokens(), DenseAttention()), requests_.One(LongTokens(), Share()),
            requests_.One(LongTokens(), Scored()), requests_.One(LongTokens(), VerticalSlash()),
            requests_.One(1300, Share())};
  }

  const RandomCheckpoint checkpoint_{ConfigForLongTokens()};
  std::unique_ptr<PrefillEngine> engine_;
  RequestMaker requests_{checkpoint_.config().vocab_size};
};

// At every point inside a layer of a long prompt one step of a short one is computed.
TEST_F(InterjectedPrompts, AreAndLeaveEverythingAsItIsAlone) {
  const std::vector<Request> shorts = Shorts();
  std::vector<Outcome> shorts_alone;
  for (const Request& request : shorts) shorts_alone.push_back(Alone(*engine_, request));
  for (const Request& outer : Longs()) {
    SCOPED_TRACE(testing::Message() << Name(outer.attention.policy) << " of "
                                    << outer.prompts.front().size() << " tokens");
    const Outcome outer_alone = Alone(*engine_, outer);
    Runner run(*engine_, outer);
    size_t started = 0;
    std::unique_ptr<Runner> interjected;
    const auto at_point = [&] {
      if (interjected == nullptr || interjected->done()) {
        interjected = std::make_unique<Runner>(*engine_, shorts[started++ % shorts.size()]);
        EXPECT_TRUE(interjected->sequence().may_interject());
      }
      interjected->Step();
      if (interjected->done()) {
        ExpectSame(interjected->outcome, shorts_alone[(started - 1) % shorts.size()]);
      }
      return true;
    };
    EXPECT_FALSE(run.sequence().may_interject());
    while (!run.done() && !HasFatalFailure()) run.Step(at_point);
    ExpectSame(run.outcome, outer_alone);
    EXPECT_GT(started, 0);
  }
}

TEST(HeadsBetweenPauses, AreMoreThanOneUnlessOneTakesLong) {
  const auto heads = [](bool asynchronous, int64_t num_queries, int num_heads, int num_kv_heads) {
    return HeadsBetweenPauses(
        {.asynchronous = asynchronous},
        {.num_queries = num_queries, .num_heads = num_heads, .num_kv_heads = num_kv_heads});
  };
  EXPECT_EQ(heads(true, 65535, 28, 4), 28);
  EXPECT_EQ(heads(true, 65536, 28, 4), 7);
  EXPECT_EQ(heads(true, 1'000'000, 32, 32), 4);
  EXPECT_EQ(heads(false, 4095, 8, 2), 8);
  EXPECT_EQ(heads(false, 4096, 8, 2), 4);
  EXPECT_EQ(heads(false, 16384, 8, 2), 1);
  EXPECT_EQ(heads(false, 16384, 32, 8), 4);
}

// The model has four heads, two for each KV head. The attention of two dense heads is three parts,
// of one dense head or two sparse ones it is two, and of one sparse head it is one.
TEST_F(InterjectedPrompts, MayComeBetweenThePartsOfALongPromptsAttention) {
  ASSERT_EQ(checkpoint_.config().head_dim, kHeadDim);
  // Returns the points of the first two layers, without those at tiles of tokens.
  const auto points_between_parts = [&](int64_t num_tokens, const AttentionOptions& attention) {
    Runner run(*engine_, requests_.One(num_tokens, attention));
    std::vector<int64_t> points(2, -2 * kernels::CeilDiv(num_tokens, kTileTokens));
    for (int64_t& of_layer : points) {
      run.RunLayer([&of_layer] {
        ++of_layer;
        return true;
      });
    }
    return points;
  };
  EXPECT_THAT(points_between_parts(LongTokens(), DenseAttention()), ElementsAre(2 * 3, 2 * 3));
  EXPECT_THAT(points_between_parts(LongTokens(), VerticalSlash()), ElementsAre(2 * 2, 2 * 2));
  EXPECT_THAT(points_between_parts(LongTokens(), Scored()), ElementsAre(2 + 2 * 2, 2 + 2 * 2))
      << "scores of two groups of heads, and their attention";
  EXPECT_THAT(points_between_parts(LongTokens(), Share()), ElementsAre(2 + 2 + 1, 2 * 2))
      << "a pivot and three that share it, then four that share it";
  EXPECT_THAT(points_between_parts(1300, Scored()), ElementsAre(0, 0));
}

// The device computes one thing at a time, so the times of all do not exceed the time that passed.
TEST_F(InterjectedPrompts, EachIsToldItsOwnTime) {
  const std::vector<Request> shorts = Shorts();
  for (const AttentionOptions& attention : {DenseAttention(), Share(), Scored()}) {
    SCOPED_TRACE(testing::Message() << Name(attention.policy) << ", " << attention.coverage);
    Runner run(*engine_, requests_.One(LongTokens(), attention));
    size_t started = 0;
    double shorts_us = 0.0, known_us = 0.0;
    std::unique_ptr<Runner> interjected;
    const auto began = std::chrono::steady_clock::now();
    const auto at_point = [&] {
      EXPECT_GE(run.sequence().device_us(), known_us);
      known_us = run.sequence().device_us();
      if (interjected == nullptr || interjected->outcome.logits.size() > 0) {
        interjected.reset();
        interjected = std::make_unique<Runner>(*engine_, shorts[started++ % shorts.size()]);
      }
      const double before_us = interjected->sequence().device_us();
      interjected->Step();
      shorts_us += interjected->sequence().device_us() - before_us;
      return true;
    };
    double layers_us = 0.0;
    for (int layer = 0; layer < checkpoint_.config().num_layers && !HasFatalFailure(); ++layer) {
      run.Step(at_point);
      const LayerReport& report = run.reports.back();
      EXPECT_GT(report.compute_us, 0);
      EXPECT_GT(report.attention_us, 0);
      EXPECT_GE(report.pattern_us, 0);
      EXPECT_LE(report.attention_us + report.pattern_us, report.compute_us + 3) << "rounded";
      layers_us += static_cast<double>(report.compute_us);
    }
    const std::chrono::duration<double, std::micro> passed =
        std::chrono::steady_clock::now() - began;
    EXPECT_GT(shorts_us, 0.0);
    EXPECT_LE(layers_us + shorts_us, passed.count());
    EXPECT_NEAR(run.sequence().device_us(), layers_us, checkpoint_.config().num_layers);
    run.Step();  // the logits
    EXPECT_GT(run.sequence().device_us(), layers_us);
  }
}

TEST_F(InterjectedPrompts, StopALayer) {
  const Request stopped = requests_.One(1300, DenseAttention()),
                next = requests_.One(1300, Share());
  const Outcome next_alone = Alone(*engine_, next);
  for (int points = 0; points < 3; ++points) {
    Runner run(*engine_, stopped);
    run.RunLayer();
    int reached = 0;
    const auto report = run.sequence().RunLayer([&] { return reached++ < points; });
    EXPECT_EQ(report.status().code(), absl::StatusCode::kCancelled);
    EXPECT_EQ(reached, points + 1);
    EXPECT_EQ(run.sequence().RunLayer().status().code(), absl::StatusCode::kCancelled);
  }
  ExpectSame(Alone(*engine_, next), next_alone);
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) { return prefilld::model::RunTestsOnDevice(argc, argv); }
