// Prompts laid one after another, so that one pass through the layers computes all of them.
#ifndef PREFILLD_MODEL_PREFILL_PACKED_PROMPTS_H_
#define PREFILLD_MODEL_PREFILL_PACKED_PROMPTS_H_

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/attention.h"

namespace prefilld::model {

// The place of one prompt's tokens among those of all.
struct PromptPlace {
  int64_t first = 0;
  int64_t count = 0;
};

// Each prompt begins at a multiple of kAlignment, and its positions begin at 0. The room behind a
// prompt is padding, token 0. Padding is computed like any token, but no prompt's token sees it:
// within a prompt's last block it comes after the prompt, and whole blocks of padding see only
// themselves.
class PackedPrompts {
 public:
  // The largest block of an attention pattern.
  static constexpr int64_t kAlignment = 128;
  // Counts the tokens that a prompt takes, the padding behind it included.
  static constexpr int64_t PaddedTokens(int64_t num_tokens) {
    return kernels::CeilDiv(num_tokens, kAlignment) * kAlignment;
  }

  PackedPrompts() = default;  // of no prompts
  // Packs the prompts. With `pad_last` there is padding behind the last prompt too.
  PackedPrompts(absl::Span<const absl::Span<const uint32_t>> prompts, bool pad_last);

  int count() const { return static_cast<int>(places_.size()); }
  absl::Span<const PromptPlace> places() const { return places_; }
  // The tokens of all prompts, padding included.
  absl::Span<const uint32_t> tokens() const { return tokens_; }
  absl::Span<const uint32_t> tokens_of(int prompt) const {
    return tokens().subspan(places_[prompt].first, places_[prompt].count);
  }

  // Returns the position of every token, padding included.
  std::vector<int32_t> Positions() const;
  // Returns the attention pattern (kernels/attention.h) in which the queries of a prompt see the
  // keys of that prompt and no others: block-diagonal, and causal within. kAlignment must be a
  // multiple of `block_tokens`.
  std::vector<uint32_t> Pattern(int block_tokens) const;

 private:
  std::vector<PromptPlace> places_;
  std::vector<uint32_t> tokens_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PACKED_PROMPTS_H_
