// How likely a model finds a prompt, token by token.
#ifndef PREFILLD_MODEL_PREFILL_PROMPT_LOGPROBS_H_
#define PREFILLD_MODEL_PREFILL_PROMPT_LOGPROBS_H_

#include <vector>

namespace prefilld::model {

// Natural logarithms of the probabilities that positions 0 .. n - 2 of n tokens give to the token
// that follows, and to the likeliest one; equal where the token that follows is the likeliest, or
// one of several.
struct PromptLogprobs {
  std::vector<float> of_token;  // entry i: of token i + 1
  std::vector<float> of_best;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PROMPT_LOGPROBS_H_
