#include "model/checkpoint/fingerprint.h"

#include <xxhash.h>

#include <bit>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace prefilld::model {
namespace {

// This must change whenever the text below does, so that an old fingerprint never equals a new one
// by chance.
constexpr char kFormat[] = "prefilld-fingerprint 1\n";

// Numbers are written as bit patterns, because decimal forms depend on who prints them.
auto Bits(double value) { return absl::Hex(std::bit_cast<uint64_t>(value)); }

// Writes the fields that change the result; eos ids, longest prompt and family do not.
std::string ConfigFacts(const ModelConfig& c) {
  const RopeConfig& r = c.rope;
  return absl::StrCat(
      absl::StrCat("vocab ", c.vocab_size, " hidden ", c.hidden, " intermediate ", c.intermediate,
                   " layers ", c.num_layers, " heads ", c.num_heads, " kv_heads ", c.num_kv_heads,
                   " head_dim ", c.head_dim, "\n"),
      absl::StrCat("epsilon ", Bits(c.rms_norm_epsilon), " qkv_bias ", c.qkv_bias, " output_bias ",
                   c.output_bias, " qk_norm ", c.qk_norm, " tied ", c.tied_embeddings, "\n"),
      absl::StrCat("rope ", static_cast<int>(r.kind), " theta ", Bits(r.theta), " factor ",
                   Bits(r.factor), " original ", r.original_max_positions, " low ",
                   Bits(r.low_freq_factor), " high ", Bits(r.high_freq_factor), "\n"),
      absl::StrCat("fast ", Bits(r.beta_fast), " slow ", Bits(r.beta_slow), " mscale ",
                   Bits(r.mscale), " all ", Bits(r.mscale_all_dim), " attention ",
                   Bits(r.attention_factor), " truncate ", r.truncate, "\n"));
}

std::string TensorFacts(const std::string& name, const TensorDigest& digest) {
  std::string text = absl::StrCat(name, " ", Name(digest.tensor->dtype), " [",
                                  absl::StrJoin(digest.tensor->shape, ","), "]");
  for (const ContentDigest& stretch : digest.stretches) {
    absl::StrAppend(&text, " ", absl::Hex(stretch.high, absl::kZeroPad16),
                    absl::Hex(stretch.low, absl::kZeroPad16));
  }
  return text + "\n";
}

}  // namespace

ContentDigest DigestContent(const void* data, size_t bytes) {
  const XXH128_hash_t hash = XXH3_128bits(data, bytes);
  return {.low = hash.low64, .high = hash.high64};
}

std::string Fingerprint(const ModelConfig& config,
                        const std::map<std::string, TensorDigest>& tensors) {
  std::string text = absl::StrCat(kFormat, ConfigFacts(config));
  for (const auto& [name, digest] : tensors) absl::StrAppend(&text, TensorFacts(name, digest));
  const ContentDigest hash = DigestContent(text.data(), text.size());
  return absl::StrCat(absl::Hex(hash.high, absl::kZeroPad16),
                      absl::Hex(hash.low, absl::kZeroPad16));
}

}  // namespace prefilld::model
