#include "tests/bench/simulator/server_profile.h"

#include <fstream>
#include <iterator>

#include "absl/strings/str_cat.h"
#include "model/sparse/attention_options.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"

namespace prefilld::bench {
namespace {

using ::nlohmann::json;

// Reads numbers of one object, and remembers the first that is wrong.
class Fields {
 public:
  Fields(const json& object, std::string where) : object_(object), where_(std::move(where)) {}

  double Number(const char* name, double least) {
    const auto at = object_.find(name);
    if (at != object_.end() && at->is_number() && at->get<double>() >= least) {
      return at->get<double>();
    }
    Complain(absl::StrCat(name, " is no number of at least ", least));
    return least;
  }
  int64_t Count(const char* name, int64_t least) {
    const auto at = object_.find(name);
    if (at != object_.end() && at->is_number_integer() && at->get<int64_t>() >= least) {
      return at->get<int64_t>();
    }
    Complain(absl::StrCat(name, " is no whole number of at least ", least));
    return least;
  }
  // Returns `absent` where there is no such field.
  double OptionalNumber(const char* name, double least, double absent) {
    return object_.contains(name) ? Number(name, least) : absent;
  }
  bool Truth(const char* name) {
    const auto at = object_.find(name);
    if (at != object_.end() && at->is_boolean()) return at->get<bool>();
    Complain(absl::StrCat(name, " is neither true nor false"));
    return false;
  }
  void Complain(const std::string& what) {
    if (problem_.empty()) problem_ = absl::StrCat(where_, what);
  }
  absl::Status status() const {
    return problem_.empty() ? absl::OkStatus() : absl::InvalidArgumentError(problem_);
  }

 private:
  const json& object_;
  const std::string where_;
  std::string problem_;
};

absl::StatusOr<MeasuredPrompt> ToPrompt(const json& object, size_t position) {
  Fields fields(object, absl::StrCat("prompts[", position, "]."));
  MeasuredPrompt prompt;
  const auto policy = model::ParsePolicy(object.value("policy", ""));
  if (policy.has_value()) {
    prompt.policy = *policy;
  } else {
    fields.Complain(absl::StrCat("policy is not one of ", model::AllPolicyNames()));
  }
  prompt.num_tokens = fields.Count("num_tokens", 1);
  prompt.layer_us = fields.Number("layer_us", 0);
  prompt.last_layer_us = fields.Number("last_layer_us", 0);
  prompt.first_token_us = fields.Number("first_token_us", 0);
  prompt.first_layer_us = fields.OptionalNumber("first_layer_us", 0, /*absent=*/prompt.layer_us);
  PREFILLD_RETURN_IF_ERROR(fields.status());
  return prompt;
}

}  // namespace

absl::StatusOr<ServerProfile> ParseProfile(const std::string& text) {
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object()) return absl::InvalidArgumentError("it is no JSON object");
  Fields fields(object, "");
  ServerProfile profile;
  profile.num_layers = static_cast<int>(fields.Count("num_layers", 1));
  profile.max_tokens = fields.Count("max_tokens", 1);
  profile.crossover_tokens = fields.Count("crossover_tokens", 0);
  profile.cache_block_bytes = fields.Count("cache_block_bytes", 0);
  profile.max_batch_tokens = fields.Count("max_batch_tokens", 0);
  profile.interject_tokens = fields.Count("interject_tokens", 0);
  profile.part_tokens = fields.Count("part_tokens", 1);
  profile.attention_part_us = fields.Number("attention_part_us", 1);
  profile.queues_ahead = fields.Truth("queues_ahead");
  profile.request_us = fields.Number("request_us", 0);
  const json places = object.value("places", json::array());
  for (size_t i = 0; places.is_array() && i < places.size(); ++i) {
    if (places[i].is_number_integer()) profile.places.push_back(places[i].get<int64_t>());
  }
  if (profile.places.empty()) fields.Complain("places is no list of numbers of tokens");
  PREFILLD_RETURN_IF_ERROR(fields.status());
  const json prompts = object.value("prompts", json::array());
  for (size_t i = 0; prompts.is_array() && i < prompts.size(); ++i) {
    PREFILLD_ASSIGN_OR_RETURN(const MeasuredPrompt prompt, ToPrompt(prompts[i], i));
    profile.prompts.push_back(prompt);
  }
  if (profile.prompts.empty()) return absl::InvalidArgumentError("prompts is empty");
  return profile;
}

absl::StatusOr<ServerProfile> ReadProfile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  auto profile = ParseProfile(text);
  if (profile.ok()) return profile;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", profile.status().message()));
}

}  // namespace prefilld::bench
