// Turns the text of a prompt into a model's tokens, and its tokens into text.
#ifndef PREFILLD_CLIENT_CLI_TEXT_TOKENS_H_
#define PREFILLD_CLIENT_CLI_TEXT_TOKENS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace prefilld::client {

// The tokens of one model. Not thread-safe.
class TextTokens {
 public:
  virtual ~TextTokens() = default;

  // Returns the tokens of a prompt, with the beginning token that the model wants.
  virtual absl::StatusOr<std::vector<uint32_t>> Encode(absl::string_view text) = 0;

  // Takes the next token of an answer and returns the text that is certain with it. A character may
  // need several tokens, and special tokens have no text.
  virtual absl::StatusOr<std::string> Decode(uint32_t token_id) = 0;
  // Returns what Decode held back. Must be called after the last token.
  virtual absl::StatusOr<std::string> DecodeRest() = 0;
};

// The tokens of byte-level models: 0 to 255 are bytes, and the others are special.
class ByteTokens final : public TextTokens {
 public:
  // `bos` is put before the bytes of a prompt; -1: nothing is.
  explicit ByteTokens(int bos) : bos_(bos) {}

  absl::StatusOr<std::vector<uint32_t>> Encode(absl::string_view text) override;
  absl::StatusOr<std::string> Decode(uint32_t token_id) override;
  absl::StatusOr<std::string> DecodeRest() override { return std::string(); }

 private:
  const int bos_;
};

// Finds out how the model in `model_dir` is spoken to: ByteTokens if its config.json says
// "byte_tokens": true, and otherwise its tokenizer.json by a process of the program
// `python`. FAILED_PRECONDITION says why there is no way to turn a text into tokens of this model.
absl::StatusOr<std::unique_ptr<TextTokens>> OpenTextTokens(const std::string& model_dir, int bos,
                                                           const std::string& python);

// Compares config.json of `model_dir` with what a server says of the model that it serves; 0: it
// does not say. Tokens that another model's tokenizer makes of a text are rubbish to it.
// FAILED_PRECONDITION names the field and both values.
absl::Status CheckServedModel(const std::string& model_dir, uint32_t vocab_size,
                              uint32_t num_layers);

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_CLI_TEXT_TOKENS_H_
