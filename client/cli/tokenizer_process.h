// Speaks to the tokenizer of the Python client, because there is no maintained one for C++.
#ifndef PREFILLD_CLIENT_CLI_TOKENIZER_PROCESS_H_
#define PREFILLD_CLIENT_CLI_TOKENIZER_PROCESS_H_

#include <sys/types.h>

#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cli/text_tokens.h"
#include "nlohmann/json_fwd.hpp"

namespace prefilld::client {

// A process `python -m prefilld.text_tokens FOLDER`, which answers one line of JSON with one line
// (client/python/prefilld/text_tokens.py). It ends when this object is destroyed.
class TokenizerProcess final : public TextTokens {
 public:
  // FAILED_PRECONDITION says what is missing: Python, the package, or a tokenizer that can be read.
  static absl::StatusOr<std::unique_ptr<TextTokens>> Start(const std::string& python,
                                                           const std::string& model_dir);
  ~TokenizerProcess() override;
  TokenizerProcess(const TokenizerProcess&) = delete;
  TokenizerProcess& operator=(const TokenizerProcess&) = delete;

  // INVALID_ARGUMENT: the text is not UTF-8.
  absl::StatusOr<std::vector<uint32_t>> Encode(absl::string_view text) override;
  absl::StatusOr<std::string> Decode(uint32_t token_id) override;
  absl::StatusOr<std::string> DecodeRest() override;

 private:
  TokenizerProcess(pid_t pid, FILE* answers) : pid_(pid), answers_(answers) {}

  absl::StatusOr<nlohmann::json> ReadAnswer();
  absl::StatusOr<nlohmann::json> Ask(const nlohmann::json& question);
  absl::StatusOr<std::string> AskText(const nlohmann::json& question);

  const pid_t pid_;
  FILE* const answers_;  // owns the socket to the process; questions go through its descriptor
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_TOKENIZER_PROCESS_H_
