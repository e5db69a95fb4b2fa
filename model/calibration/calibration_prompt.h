// The prompts that a calibration runs over.
#ifndef PREFILLD_MODEL_CALIBRATION_CALIBRATION_PROMPT_H_
#define PREFILLD_MODEL_CALIBRATION_CALIBRATION_PROMPT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "model/checkpoint/config.h"

namespace prefilld::model {

struct CalibrationPrompt {
  std::string name;    // of the file, without its ending
  std::string domain;  // what kind of text it is: the name of the file's folder, unless it says
  std::vector<uint32_t> tokens;

  std::string FileName() const { return domain + "." + name + ".safetensors"; }
};

// Makes a prompt from the content of a file. `path` ends in one of
//   .json  a list of token ids, or {"token_ids": [...], "domain": "..."}; other keys are not read
//   .txt   text for byte-level models: one token per byte, after the token `bos` (-1: none)
// INVALID_ARGUMENT begins with the path.
absl::StatusOr<CalibrationPrompt> ParseCalibrationPrompt(const std::string& path,
                                                         absl::string_view content, int bos);

// Reads the prompts of all paths in the order given. A folder stands for the .json and .txt files
// in it and below, sorted. Ids are checked against the model's vocabulary, lengths against its
// positions, and a .txt needs a byte-level model (ModelConfig::byte_tokens). No two prompts may
// have the same FileName. NOT_FOUND and INVALID_ARGUMENT begin with the path.
absl::StatusOr<std::vector<CalibrationPrompt>> ReadCalibrationPrompts(
    const std::vector<std::string>& paths, int bos, const ModelConfig& model);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CALIBRATION_CALIBRATION_PROMPT_H_
