// The names of cached prefixes.
//
// A name is made so that a router can compute it, in any language, without asking the server:
//   root     = XXH3-128 of the text "prefilld-prefix 1\n<fingerprint>\n<rope_tokens>\n<salt>"
//   block 0  = XXH3-128 of root,          then tokens 0 .. 127
//   block i  = XXH3-128 of block i - 1,   then tokens 128 i .. 128 i + 127
// Seed 0; a hash is 16 bytes in canonical order, the high half first, big-endian; a token is an
// unsigned 32-bit integer, little-endian. prefilld.prefix_keys() of client/python does the same.
#ifndef PREFILLD_MODEL_PREFILL_PREFIX_KEY_H_
#define PREFILLD_MODEL_PREFILL_PREFIX_KEY_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace prefilld::model {

// The tokens of a cached block. Every block of an attention pattern begins where one of these does,
// or in its middle.
inline constexpr int64_t kPrefixBlockTokens = 128;

using PrefixKey = std::array<uint8_t, 16>;

// Hashes bytes. Caches take it as a parameter so that a test can make keys collide.
using PrefixHash = PrefixKey (*)(const void* data, size_t bytes);
PrefixKey Xxh3PrefixHash(const void* data, size_t bytes);

// Everything besides tokens that the KV of a prefix depends on, and who may see it, as the text
// that is hashed for the root. `rope_tokens` is 0 if every prompt has the same rotation; for a
// prompt whose rotation depends on its length (dynamic NTK) it is that length. `salt` keeps tenants
// apart: prompts with different salts share nothing.
std::string PrefixDomain(absl::string_view fingerprint, int64_t rope_tokens,
                         absl::string_view salt);

// Returns the key of a block; `tokens` are its kPrefixBlockTokens tokens.
PrefixKey PrefixBlockKey(const PrefixKey& parent, absl::Span<const uint32_t> tokens,
                         PrefixHash hash = Xxh3PrefixHash);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_PREFILL_PREFIX_KEY_H_
