#include "model/prefill/prefix_key.h"

#include <xxhash.h>

#include <algorithm>
#include <iterator>

#include "absl/strings/str_cat.h"

namespace prefilld::model {
namespace {

// This must change whenever keys come to mean something else, so that no old key equals a new one.
constexpr char kFormat[] = "prefilld-prefix 1\n";

}  // namespace

PrefixKey Xxh3PrefixHash(const void* data, size_t bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(data, bytes));
  PrefixKey key;
  std::copy(std::begin(canonical.digest), std::end(canonical.digest), key.begin());
  return key;
}

std::string PrefixDomain(absl::string_view fingerprint, int64_t rope_tokens,
                         absl::string_view salt) {
  return absl::StrCat(kFormat, fingerprint, "\n", rope_tokens, "\n", salt);
}

PrefixKey PrefixBlockKey(const PrefixKey& parent, absl::Span<const uint32_t> tokens,
                         PrefixHash hash) {
  std::array<uint8_t, sizeof(PrefixKey) + kPrefixBlockTokens * sizeof(uint32_t)> bytes;
  auto* at = std::copy(parent.begin(), parent.end(), bytes.data());
  for (const uint32_t token : tokens) {
    for (int shift = 0; shift < 32; shift += 8) *at++ = static_cast<uint8_t>(token >> shift);
  }
  return hash(bytes.data(), static_cast<size_t>(at - bytes.data()));
}

}  // namespace prefilld::model
