#include "client/cli/text_tokens.h"

#include <filesystem>
#include <fstream>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "client/cli/tokenizer_process.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

// Tells whether config.json declares that tokens are bytes.
absl::StatusOr<bool> HasByteTokens(const std::string& model_dir) {
  const std::string path = absl::StrCat(model_dir, "/config.json");
  std::ifstream file(path);
  const auto config = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) {
    return absl::FailedPreconditionError(
        absl::StrCat("--model: ", path, " cannot be read as a JSON object"));
  }
  const auto declared = config.find("byte_tokens");
  return declared != config.end() && *declared == true;
}

}  // namespace

absl::StatusOr<std::vector<uint32_t>> ByteTokens::Encode(absl::string_view text) {
  std::vector<uint32_t> ids;
  ids.reserve(text.size() + 1);
  if (bos_ >= 0) ids.push_back(static_cast<uint32_t>(bos_));
  for (const char byte : text) ids.push_back(static_cast<uint8_t>(byte));
  return ids;
}

absl::StatusOr<std::string> ByteTokens::Decode(uint32_t token_id) {
  return token_id < 256 ? std::string(1, static_cast<char>(token_id)) : std::string();
}

absl::StatusOr<std::unique_ptr<TextTokens>> OpenTextTokens(const std::string& model_dir, int bos,
                                                           const std::string& python) {
  if (model_dir.empty()) {
    return absl::FailedPreconditionError(
        "a text needs --model=FOLDER, the folder of the model that is served: its tokenizer.json "
        "turns text into tokens. Without the folder, give the prompt as --token_ids");
  }
  PREFILLD_ASSIGN_OR_RETURN(const bool bytes, HasByteTokens(model_dir));
  if (bytes) return std::make_unique<ByteTokens>(bos);
  std::error_code ignored;
  if (!std::filesystem::exists(absl::StrCat(model_dir, "/tokenizer.json"), ignored)) {
    return absl::FailedPreconditionError(absl::StrCat(
        model_dir,
        " has no tokenizer.json, and its config.json does not say \"byte_tokens\": true; "
        "text cannot become tokens of this model. Give the prompt as --token_ids"));
  }
  return TokenizerProcess::Start(python, model_dir);
}

}  // namespace prefilld::client
