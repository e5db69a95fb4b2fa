#include "model/decode/sampling.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace prefilld::model {
namespace {

using ::testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::numeric_limits<float>::quiet_NaN();

SampledToken MustSample(const std::vector<float>& logits, const SamplingOptions& options,
                        int64_t position = 0) {
  const auto token = Sample(logits, options, position);
  EXPECT_TRUE(token.ok()) << token.status();
  return token.value_or(SampledToken());
}

std::map<uint32_t, int> Histogram(const std::vector<float>& logits, SamplingOptions options,
                                  int draws) {
  std::map<uint32_t, int> counts;
  for (int position = 0; position < draws; ++position) {
    ++counts[MustSample(logits, options, position).token_id];
  }
  return counts;
}

TEST(Sample, GreedyTakesTheLargestLowestIdOnTies) {
  EXPECT_EQ(MustSample({0.0f, 3.0f, 1.0f, 3.0f}, {}).token_id, 1u);
  EXPECT_EQ(MustSample({kNan, -kInfinity, -5.0f}, {}).token_id, 2u);
}

TEST(Sample, LogprobsAreThoseOfTheModelWhateverIsCutOff) {
  SamplingOptions options;
  options.temperature = 0.1f;
  options.top_k = 1;
  options.top_logprobs = 3;
  const SampledToken token = MustSample({1.0f, 2.0f, 0.0f, -kInfinity}, options);
  const float sum = std::exp(1.0f) + std::exp(2.0f) + 1.0f;
  EXPECT_EQ(token.token_id, 1u);
  EXPECT_NEAR(token.logprob, 2.0f - std::log(sum), 1e-6);
  ASSERT_EQ(token.top_logprobs.size(), 3u);
  EXPECT_EQ(token.top_logprobs[0].first, 1u);
  EXPECT_EQ(token.top_logprobs[1].first, 0u);
  EXPECT_EQ(token.top_logprobs[2].first, 2u);
  EXPECT_NEAR(token.top_logprobs[2].second, -std::log(sum), 1e-6);
}

TEST(Sample, DrawsFollowTheProbabilities) {
  SamplingOptions options;
  options.temperature = 1.0f;
  const auto counts = Histogram({std::log(0.5f), std::log(0.3f), std::log(0.2f)}, options, 20000);
  EXPECT_NEAR(counts.at(0) / 20000.0, 0.5, 0.02);
  EXPECT_NEAR(counts.at(1) / 20000.0, 0.3, 0.02);
  EXPECT_NEAR(counts.at(2) / 20000.0, 0.2, 0.02);
}

TEST(Sample, TemperatureSharpens) {
  SamplingOptions options;
  options.temperature = 0.5f;  // probabilities squared: 0.25, 0.09, 0.04 of 0.38
  const auto counts = Histogram({std::log(0.5f), std::log(0.3f), std::log(0.2f)}, options, 20000);
  EXPECT_NEAR(counts.at(0) / 20000.0, 0.25 / 0.38, 0.02);
}

TEST(Sample, TopKAndTopPCutTheTail) {
  SamplingOptions options;
  options.temperature = 1.0f;
  const std::vector<float> logits = {std::log(0.2f), std::log(0.5f), std::log(0.3f)};
  options.top_k = 2;
  EXPECT_EQ(Histogram(logits, options, 2000).count(0), 0u);
  options.top_k = 0;
  options.top_p = 0.7f;  // 0.5 does not reach it, 0.8 does
  const auto counts = Histogram(logits, options, 20000);
  EXPECT_EQ(counts.count(0), 0u);
  EXPECT_NEAR(counts.at(1) / 20000.0, 0.5 / 0.8, 0.02);
  options.top_p = 0.5f;
  EXPECT_EQ(Histogram(logits, options, 100).size(), 1u);
  options.top_p = 1.0f;
  EXPECT_EQ(Histogram(logits, options, 2000).size(), 3u);
}

uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Follows the definition: the whole vocabulary is sorted, cut at top_k, then at top_p.
uint32_t DrawFromAll(const std::vector<float>& logits, const SamplingOptions& options,
                     int64_t position) {
  const double largest = *std::max_element(logits.begin(), logits.end());
  const auto weight = [&](uint32_t id) {
    return std::isfinite(logits[id]) ? std::exp((logits[id] - largest) / options.temperature) : 0.0;
  };
  std::vector<std::pair<double, uint32_t>> ranked;  // by falling weight, rising id
  for (uint32_t id = 0; id < logits.size(); ++id) ranked.emplace_back(-weight(id), id);
  std::sort(ranked.begin(), ranked.end());
  if (options.top_k > 0 && options.top_k < ranked.size()) ranked.resize(options.top_k);
  double total = 0.0, kept = 0.0;
  for (const auto& [negative, id] : ranked) total -= negative;
  size_t count = options.top_p > 0.0f ? 0 : ranked.size();
  while (count < ranked.size() && kept < options.top_p * total) kept -= ranked[count++].first;
  const double uniform =
      static_cast<double>(Mix(Mix(options.seed) ^ static_cast<uint64_t>(position)) >> 11) * 0x1p-53;
  double left = uniform * (options.top_p > 0.0f ? kept : total);
  for (size_t i = 0; i < count; ++i) {
    left += ranked[i].first;
    if (left < 0.0) return ranked[i].second;
  }
  return ranked.front().second;
}

TEST(Sample, DrawsAsIfTheWholeVocabularyWereSorted) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0.0f, 2.0f);
  std::vector<float> logits(3000);
  for (float& logit : logits) logit = std::round(4 * normal(random)) / 4;  // with many ties
  logits[5] = logits[1700] = -kInfinity;
  for (const float temperature : {0.3f, 1.0f, 50.0f}) {
    for (const uint32_t top_k : {0u, 40u, 2000u, 3000u}) {
      for (const float top_p : {0.0f, 0.01f, 0.5f, 0.9f, 0.9999f}) {
        const SamplingOptions options = {
            .temperature = temperature, .top_k = top_k, .top_p = top_p, .seed = top_k + 1};
        for (int64_t position = 0; position < 20; ++position) {
          ASSERT_EQ(MustSample(logits, options, position).token_id,
                    DrawFromAll(logits, options, position))
              << temperature << " " << top_k << " " << top_p << " " << position;
        }
      }
    }
  }
}

TEST(Sample, OfEqualLogitsTopPKeepsTheLowestIds) {
  const std::vector<float> logits(1000, 1.5f);
  SamplingOptions options;
  options.temperature = 1.0f;
  options.top_p = 0.25f;
  options.top_logprobs = 3;
  uint32_t highest = 0;
  for (int64_t position = 0; position < 2000; ++position) {
    const SampledToken token = MustSample(logits, options, position);
    EXPECT_EQ(token.top_logprobs[2].first, 2u);
    highest = std::max(highest, token.token_id);
  }
  EXPECT_LT(highest, 250u);
  EXPECT_GT(highest, 200u);
}

TEST(Sample, EqualSeedAndPositionDrawEqually) {
  SamplingOptions options;
  options.temperature = 1.0f;
  options.seed = 42;
  const std::vector<float> logits(1000, 0.0f);
  EXPECT_EQ(MustSample(logits, options, 7).token_id, MustSample(logits, options, 7).token_id);
  int same_at_next_position = 0;
  int same_with_next_seed = 0;
  SamplingOptions next_seed = options;
  next_seed.seed = 43;
  for (int position = 0; position < 100; ++position) {
    const uint32_t token = MustSample(logits, options, position).token_id;
    same_at_next_position += token == MustSample(logits, options, position + 1).token_id;
    same_with_next_seed += token == MustSample(logits, next_seed, position).token_id;
  }
  EXPECT_LT(same_at_next_position, 5);
  EXPECT_LT(same_with_next_seed, 5);
}

TEST(Sample, SurvivesExtremeOptions) {
  SamplingOptions options;
  options.temperature = std::numeric_limits<float>::denorm_min();
  options.top_k = std::numeric_limits<uint32_t>::max();
  options.top_p = std::numeric_limits<float>::denorm_min();
  EXPECT_EQ(MustSample({1.0f, 2.0f}, options).token_id, 1u);
}

TEST(Sample, LogitsWithoutAFiniteLargestAreAnError) {
  EXPECT_EQ(Sample({kNan, kNan}, {}, 3).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Sample({1.0f, kInfinity}, {}, 3).status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(Sample({}, {}, 3).status().code(), absl::StatusCode::kInternal);
}

TEST(ValidateSampling, NamesFieldValueAndRange) {
  EXPECT_TRUE(Validate(SamplingOptions()).ok());
  SamplingOptions options;
  options.temperature = -1.0f;
  EXPECT_THAT(Validate(options).message(),
              HasSubstr("sampling.temperature -1 is outside [0, 100]"));
  options.temperature = kNan;
  EXPECT_FALSE(Validate(options).ok());
  options = {};
  options.top_p = 1.5f;
  EXPECT_THAT(Validate(options).message(), HasSubstr("sampling.top_p 1.5 is outside [0, 1]"));
  options = {};
  options.top_logprobs = 21;
  EXPECT_THAT(Validate(options).message(), HasSubstr("sampling.top_logprobs 21"));
}

}  // namespace
}  // namespace prefilld::model
