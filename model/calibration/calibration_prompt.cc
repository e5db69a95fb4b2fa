#include "model/calibration/calibration_prompt.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "model/checkpoint/strict_json.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

bool IsPromptFile(const fs::path& path) {
  return path.extension() == ".json" || path.extension() == ".txt";
}

absl::Status Invalid(const std::string& path, absl::string_view reason) {
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", reason));
}

// Lists the files that a path stands for.
absl::StatusOr<std::vector<std::string>> Expand(const std::string& path) {
  std::error_code error;
  const fs::file_status status = fs::status(path, error);
  if (!fs::exists(status)) return absl::NotFoundError(absl::StrCat(path, ": no such file"));
  if (!fs::is_directory(status)) {
    if (!IsPromptFile(path)) return Invalid(path, "a prompt ends in .json or .txt");
    return std::vector<std::string>{path};
  }
  std::vector<std::string> files;
  for (auto entry = fs::recursive_directory_iterator(path, error);
       !error && entry != fs::recursive_directory_iterator(); entry.increment(error)) {
    if (IsPromptFile(entry->path())) files.push_back(entry->path().string());
  }
  if (error) return Invalid(path, error.message());
  if (files.empty()) return Invalid(path, "no .json or .txt files in this folder");
  std::sort(files.begin(), files.end());
  return files;
}

absl::StatusOr<std::string> ReadAll(const std::string& path) {
  using Iterator = std::istreambuf_iterator<char>;
  std::ifstream file(path, std::ios::binary);
  file.peek();  // fails on a folder, where the iterator would throw
  if (file.bad() || !file.is_open()) return Invalid(path, "cannot be read");
  return std::string(Iterator(file), Iterator());
}

absl::StatusOr<std::vector<uint32_t>> TokenIds(const std::string& path, const json& ids) {
  if (!ids.is_array())
    return Invalid(path, "neither a list of token ids nor {\"token_ids\": [...]}");
  std::vector<uint32_t> tokens;
  tokens.reserve(ids.size());
  for (const json& id : ids) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > UINT32_MAX) {
      return Invalid(path,
                     absl::StrCat("token_ids[", tokens.size(), "] ", Shown(id), " is no token id"));
    }
    tokens.push_back(id.get<uint32_t>());
  }
  return tokens;
}

absl::Status ParseJsonPrompt(const std::string& path, absl::string_view content,
                             CalibrationPrompt& prompt) {
  absl::StatusOr<json> parsed = ParseStrictJson(content);
  if (!parsed.ok()) return Invalid(path, parsed.status().message());
  const json* ids = &*parsed;
  if (parsed->is_object()) {
    const json& domain = parsed->emplace("domain", prompt.domain).first.value();
    if (!domain.is_string()) return Invalid(path, "domain is no string");
    prompt.domain = domain.get<std::string>();
    ids = &parsed->emplace("token_ids", nullptr).first.value();
  }
  PREFILLD_ASSIGN_OR_RETURN(prompt.tokens, TokenIds(path, *ids));
  return absl::OkStatus();
}

absl::Status Check(const std::string& path, const CalibrationPrompt& prompt,
                   const ModelConfig& model) {
  if (fs::path(path).extension() == ".txt" && !model.byte_tokens) {
    return Invalid(
        path,
        "a text becomes bytes, and the tokens of this model are no bytes: config.json does "
        "not say \"byte_tokens\": true. Make .json prompts of token ids instead "
        "(make_prompts.py --tokenizer)");
  }
  const bool fits_file_name =
      !prompt.domain.empty() && std::none_of(prompt.domain.begin(), prompt.domain.end(),
                                             [](char c) { return c == '/' || c == '\0'; });
  if (!fits_file_name) {
    return Invalid(path,
                   absl::StrCat("domain '", prompt.domain, "' cannot be part of a file name"));
  }
  const auto num_tokens = static_cast<int64_t>(prompt.tokens.size());
  const int64_t max_tokens = PositionLimit(model);
  if (num_tokens < 1 || num_tokens > max_tokens) {
    return Invalid(path, absl::StrCat(num_tokens, " tokens are outside [1, ", max_tokens, "]"));
  }
  for (size_t i = 0; i < prompt.tokens.size(); ++i) {
    if (prompt.tokens[i] < model.vocab_size) continue;
    return Invalid(path, absl::StrCat("token_ids[", i, "] ", prompt.tokens[i],
                                      " is outside the vocabulary of ", model.vocab_size));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<CalibrationPrompt> ParseCalibrationPrompt(const std::string& path,
                                                         absl::string_view content, int bos) {
  std::error_code error;
  const fs::path whole = fs::absolute(path, error);
  CalibrationPrompt prompt;
  prompt.name = whole.stem().string();
  prompt.domain = whole.parent_path().filename().string();
  if (whole.extension() == ".json") {
    PREFILLD_RETURN_IF_ERROR(ParseJsonPrompt(path, content, prompt));
    return prompt;
  }
  prompt.tokens.reserve(content.size() + 1);
  if (bos >= 0) prompt.tokens.push_back(static_cast<uint32_t>(bos));
  for (const char byte : content) prompt.tokens.push_back(static_cast<uint8_t>(byte));
  return prompt;
}

absl::StatusOr<std::vector<CalibrationPrompt>> ReadCalibrationPrompts(
    const std::vector<std::string>& paths, int bos, const ModelConfig& model) {
  std::vector<CalibrationPrompt> prompts;
  std::set<std::string> names;
  for (const std::string& path : paths) {
    PREFILLD_ASSIGN_OR_RETURN(const std::vector<std::string> files, Expand(path));
    for (const std::string& file : files) {
      PREFILLD_ASSIGN_OR_RETURN(const std::string content, ReadAll(file));
      PREFILLD_ASSIGN_OR_RETURN(CalibrationPrompt prompt,
                                ParseCalibrationPrompt(file, content, bos));
      PREFILLD_RETURN_IF_ERROR(Check(file, prompt, model));
      if (!names.insert(prompt.FileName()).second) {
        return Invalid(file, absl::StrCat("a second prompt '", prompt.name, "' of domain '",
                                          prompt.domain, "'"));
      }
      prompts.push_back(std::move(prompt));
    }
  }
  return prompts;
}

}  // namespace prefilld::model
