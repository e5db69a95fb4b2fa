#ifndef PREFILLD_CLIENT_CLI_PROMPT_H_
#define PREFILLD_CLIENT_CLI_PROMPT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cli/options.h"

namespace prefilld::client {

struct Prompt {
  std::vector<uint32_t> token_ids;
  bool is_text = false;  // bytes are tokens: show what is generated as text
};

// Reads a prompt. INVALID_ARGUMENT: the file cannot be read, the ids do not parse, or the prompt is
// empty.
absl::StatusOr<Prompt> ReadPrompt(const PromptSource& source);

// Parses "1, 2 3" or "[1,2,3]". INVALID_ARGUMENT shows what is no id.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text);

// Returns the bytes of a token of a byte-level model; none for its special tokens (256 and up).
std::string TokenText(uint32_t token_id);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_PROMPT_H_
