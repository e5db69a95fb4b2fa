#ifndef PREFILLD_CLIENT_CLI_PROMPT_H_
#define PREFILLD_CLIENT_CLI_PROMPT_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "client/cli/options.h"
#include "client/cli/text_tokens.h"

namespace prefilld::client {

struct Prompt {
  std::vector<uint32_t> token_ids;
  std::unique_ptr<TextTokens> text;  // of a prompt that is text: shows what is generated; else null
};

// Reads a prompt. INVALID_ARGUMENT: the file cannot be read, the ids do not parse, or the prompt is
// empty. FAILED_PRECONDITION: a text cannot become tokens of the model, and the message says why.
absl::StatusOr<Prompt> ReadPrompt(const PromptSource& source);

// Parses "1, 2 3", "[1,2,3]" or, as our tools write prompts and answers, an object with
// "token_ids": [1,2,3]. INVALID_ARGUMENT shows what is no id.
absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_PROMPT_H_
