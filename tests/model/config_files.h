// Configurations of real models, to load as they are or changed.
#ifndef PREFILLD_TESTS_MODEL_CONFIG_FILES_H_
#define PREFILLD_TESTS_MODEL_CONFIG_FILES_H_

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "model/checkpoint/config.h"

namespace prefilld::model {

nlohmann::json Llama();  // 3.1
nlohmann::json Qwen2();
nlohmann::json Mistral();  // without a window

// Load a folder that has this config.json alone.
absl::StatusOr<ModelConfig> LoadText(const std::string& text,
                                     const std::vector<std::string>& overruled_keys = {});
absl::StatusOr<ModelConfig> Load(const nlohmann::json& config);
// Loads `config` with the fields of `patch`. A null erases a field.
absl::StatusOr<ModelConfig> LoadWith(nlohmann::json config, const char* patch,
                                     const std::vector<std::string>& overruled_keys = {});

// Returns the message of a refusal.
std::string Reason(const absl::StatusOr<ModelConfig>& refused);

}  // namespace prefilld::model

#endif  // PREFILLD_TESTS_MODEL_CONFIG_FILES_H_
