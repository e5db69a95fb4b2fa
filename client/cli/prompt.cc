#include "client/cli/prompt.h"

#include <fstream>
#include <iostream>
#include <iterator>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

absl::StatusOr<std::string> ReadAll(const std::string& path) {
  using Iterator = std::istreambuf_iterator<char>;
  std::ifstream file;
  if (path != "-") file.open(path, std::ios::binary);
  std::istream& input = path == "-" ? std::cin : file;
  // A folder opens like a file. This read fails on it, while the iterator's would throw.
  input.peek();
  if (input.fail()) return absl::InvalidArgumentError(absl::StrCat(path, " cannot be read"));
  return std::string(Iterator(input), Iterator());
}

Prompt FromText(absl::string_view text, int bos) {
  Prompt prompt;
  prompt.is_text = true;
  prompt.token_ids.reserve(text.size() + 1);
  if (bos >= 0) prompt.token_ids.push_back(static_cast<uint32_t>(bos));
  for (const char byte : text) prompt.token_ids.push_back(static_cast<uint8_t>(byte));
  return prompt;
}

absl::StatusOr<Prompt> FromTokenIds(absl::string_view text) {
  PREFILLD_ASSIGN_OR_RETURN(std::vector<uint32_t> ids, ParseTokenIds(text));
  return Prompt{std::move(ids), /*is_text=*/false};
}

absl::StatusOr<Prompt> Read(const PromptSource& source) {
  if (source.text) return FromText(*source.text, source.bos);
  if (source.token_ids) return FromTokenIds(*source.token_ids);
  const bool is_text = source.text_file.has_value();
  PREFILLD_ASSIGN_OR_RETURN(
      const std::string content,
      ReadAll(is_text ? *source.text_file : source.token_ids_file.value_or("-")));
  return is_text ? FromText(content, source.bos) : FromTokenIds(content);
}

}  // namespace

absl::StatusOr<Prompt> ReadPrompt(const PromptSource& source) {
  PREFILLD_ASSIGN_OR_RETURN(Prompt prompt, Read(source));
  if (prompt.token_ids.empty()) {
    return absl::InvalidArgumentError("the prompt is empty");
  }
  return prompt;
}

absl::StatusOr<std::vector<uint32_t>> ParseTokenIds(absl::string_view text) {
  text = absl::StripAsciiWhitespace(text);
  if (absl::ConsumePrefix(&text, "[") && !absl::ConsumeSuffix(&text, "]")) {
    return absl::InvalidArgumentError("token ids: the list has no closing bracket");
  }
  std::vector<uint32_t> ids;
  for (absl::string_view word :
       absl::StrSplit(text, absl::ByAnyChar(", \t\r\n"), absl::SkipEmpty())) {
    uint32_t id;
    if (!absl::SimpleAtoi(word, &id)) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ids: '", word.substr(0, 40), "' is no token id"));
    }
    ids.push_back(id);
  }
  return ids;
}

std::string TokenText(uint32_t token_id) {
  return token_id < 256 ? std::string(1, static_cast<char>(token_id)) : std::string();
}

}  // namespace prefilld::client
