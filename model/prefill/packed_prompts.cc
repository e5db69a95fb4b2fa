#include "model/prefill/packed_prompts.h"

#include <numeric>

namespace prefilld::model {

PackedPrompts::PackedPrompts(absl::Span<const absl::Span<const uint32_t>> prompts, bool pad_last) {
  const auto pad = [this] {
    tokens_.resize(PaddedTokens(static_cast<int64_t>(tokens_.size())), 0);
  };
  for (const absl::Span<const uint32_t> prompt : prompts) {
    pad();
    places_.push_back({static_cast<int64_t>(tokens_.size()), static_cast<int64_t>(prompt.size())});
    tokens_.insert(tokens_.end(), prompt.begin(), prompt.end());
  }
  if (pad_last) pad();
}

std::vector<int32_t> PackedPrompts::Positions() const {
  std::vector<int32_t> positions(tokens_.size());
  for (size_t i = 0; i < places_.size(); ++i) {
    const bool is_last = i + 1 == places_.size();
    const auto end = is_last ? positions.end() : positions.begin() + places_[i + 1].first;
    std::iota(positions.begin() + places_[i].first, end, 0);
  }
  return positions;
}

std::vector<uint32_t> PackedPrompts::Pattern(int block_tokens) const {
  const int64_t num_blocks = kernels::CeilDiv(static_cast<int64_t>(tokens_.size()), block_tokens);
  const int64_t words = kernels::PatternWords(num_blocks);
  std::vector<uint32_t> pattern(num_blocks * words, 0);
  for (const PromptPlace& place : places_) {
    const int64_t first = place.first / block_tokens;
    const int64_t end = first + kernels::CeilDiv(place.count, block_tokens);
    for (int64_t row = first; row < end; ++row) {
      for (int64_t block = first; block <= row; ++block) {
        pattern[row * words + block / 32] |= uint32_t{1} << (block % 32);
      }
    }
  }
  return pattern;
}

}  // namespace prefilld::model
