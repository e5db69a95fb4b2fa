#include "tests/integration/greedy_reference.h"

#include <stdlib.h>

#include <algorithm>
#include <cstdio>
#include <functional>

#include "tests/model/prompt_run.h"

namespace prefilld::integration {
namespace {

// Two ways to compute the same logits in fp32 differ by less than this.
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

std::vector<uint32_t> GreedyReference(const std::string& checkpoint_dir,
                                      const std::vector<uint32_t>& prompt, int num_new_tokens) {
  const auto max_tokens = static_cast<int64_t>(prompt.size()) + num_new_tokens;
  const auto engine = model::NewEngine(model::CpuEngineOptions(checkpoint_dir, max_tokens));
  std::vector<uint32_t> tokens = prompt;
  for (int i = 0; i < num_new_tokens; ++i) {
    const auto sequence =
        model::RunLayers(*engine, tokens, model::DenseAttention(), /*logprobs=*/false);
    const auto logits = sequence->FinalLogits();
    if (!logits.ok()) abort();
    tokens.push_back(ClearWinner(logits->front()));
  }
  return {tokens.begin() + static_cast<int64_t>(prompt.size()), tokens.end()};
}

}  // namespace prefilld::integration
