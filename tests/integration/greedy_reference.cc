#include "tests/integration/greedy_reference.h"

#include <stdlib.h>

#include <algorithm>
#include <cstdio>
#include <random>

#include "model/prefill_engine.h"

namespace prefilld::integration {
namespace {

// Between two ways to compute the same logits in fp32.
constexpr float kClearMargin = 1e-3f;

uint32_t ClearWinner(const std::vector<float>& logits) {
  std::vector<float> sorted = logits;
  std::nth_element(sorted.begin(), sorted.begin() + 1, sorted.end(), std::greater<float>());
  if (sorted[0] - sorted[1] < kClearMargin) {
    std::fprintf(stderr, "the two likeliest tokens are only %g apart\n", sorted[0] - sorted[1]);
    abort();
  }
  return static_cast<uint32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

}  // namespace

std::vector<uint32_t> RandomPrompt(int num_tokens, uint32_t vocab_size, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<uint32_t> prompt(num_tokens);
  for (uint32_t& id : prompt) id = static_cast<uint32_t>(random() % vocab_size);
  return prompt;
}

std::vector<uint32_t> GreedyReference(const std::string& checkpoint_dir,
                                      const std::vector<uint32_t>& prompt, int num_new_tokens) {
  model::EngineOptions options;
  options.checkpoint_dir = checkpoint_dir;
  options.device = model::DeviceChoice::kCpu;
  options.cpu_threads = 2;
  options.max_tokens = static_cast<int64_t>(prompt.size()) + num_new_tokens;
  options.attention.policy = model::AttentionPolicy::kDense;
  const auto engine = model::CreatePrefillEngine(options);
  if (!engine.ok()) abort();
  std::vector<uint32_t> tokens = prompt;
  for (int i = 0; i < num_new_tokens; ++i) {
    const auto sequence = (*engine)->Start(tokens, options.attention);
    if (!sequence.ok()) abort();
    for (int layer = 0; layer < (*engine)->info().config.num_layers; ++layer) {
      if (!(*sequence)->RunLayer().ok()) abort();
      (*sequence)->ReleaseKv(layer);
    }
    const auto logits = (*sequence)->FinalLogits();
    if (!logits.ok()) abort();
    tokens.push_back(ClearWinner(logits->front()));
  }
  return {tokens.begin() + static_cast<int64_t>(prompt.size()), tokens.end()};
}

}  // namespace prefilld::integration
