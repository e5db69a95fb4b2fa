// Draws tokens from logits, on the host. Prefill uses it for the first token, decode for the
// others.
#ifndef PREFILLD_MODEL_DECODE_SAMPLING_H_
#define PREFILLD_MODEL_DECODE_SAMPLING_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace prefilld::model {

// prefill/v1/sampling.proto explains the fields and their ranges.
struct SamplingOptions {
  float temperature = 0.0f;
  uint32_t top_k = 0;
  float top_p = 0.0f;
  uint64_t seed = 0;
  uint32_t top_logprobs = 0;
};

inline constexpr uint32_t kMaxTopLogprobs = 20;
inline constexpr float kMaxTemperature = 100.0f;

struct SampledToken {
  uint32_t token_id = 0;
  float logprob = 0.0f;  // of the model: temperature 1, nothing cut off
  std::vector<std::pair<uint32_t, float>> top_logprobs;  // descending
};

// Checks the ranges. INVALID_ARGUMENT names field, value and range.
absl::Status Validate(const SamplingOptions& options);

// Draws a token. `position` is that of the token being drawn; equal (logits, seed, position) give
// equal tokens. INTERNAL when no logit is finite.
absl::StatusOr<SampledToken> Sample(absl::Span<const float> logits, const SamplingOptions& options,
                                    int64_t position);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DECODE_SAMPLING_H_
