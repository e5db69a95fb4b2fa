#include "client/cli/prompt.h"

#include <fstream>
#include <iostream>
#include <iterator>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "nlohmann/json.hpp"
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

absl::StatusOr<Prompt> FromText(const PromptSource& source, absl::string_view text) {
  Prompt prompt;
  PREFILLD_ASSIGN_OR_RETURN(prompt.text,
                            OpenTextTokens(source.model_dir, source.bos, source.python));
  if (text.empty()) return prompt;
  PREFILLD_ASSIGN_OR_RETURN(prompt.token_ids, prompt.text->Encode(text));
  return prompt;
}

absl::StatusOr<Prompt> FromTokenIds(absl::string_view text) {
  Prompt prompt;
  PREFILLD_ASSIGN_OR_RETURN(prompt.token_ids, ParseTokenIds(text));
  return prompt;
}

absl::StatusOr<Prompt> Read(const PromptSource& source) {
  if (source.text) return FromText(source, *source.text);
  if (source.token_ids) return FromTokenIds(*source.token_ids);
  const bool is_text = source.text_file.has_value();
  PREFILLD_ASSIGN_OR_RETURN(
      const std::string content,
      ReadAll(is_text ? *source.text_file : source.token_ids_file.value_or("-")));
  return is_text ? FromText(source, content) : FromTokenIds(content);
}

// Returns the list of an object with "token_ids", such as make_prompts.py and --json write.
absl::StatusOr<std::vector<uint32_t>> FromObject(absl::string_view text) {
  const auto object = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  const auto list = object.find("token_ids");
  if (!object.is_object() || list == object.end() || !list->is_array()) {
    return absl::InvalidArgumentError("token ids: the object has no list \"token_ids\"");
  }
  std::vector<uint32_t> ids;
  ids.reserve(list->size());
  for (const auto& id : *list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > UINT32_MAX) {
      return absl::InvalidArgumentError(
          absl::StrCat("token ids: '", id.dump().substr(0, 40), "' is no token id"));
    }
    ids.push_back(id.get<uint32_t>());
  }
  return ids;
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
  if (absl::StartsWith(text, "{")) return FromObject(text);
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

}  // namespace prefilld::client
