#include "model/sparse/head_clusters.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <type_traits>
#include <utility>
#include <variant>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint/config_fields.h"
#include "model/checkpoint/strict_json.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

using nlohmann::json;

constexpr size_t kMaxFileBytes = size_t{16} << 20;
constexpr int64_t kFormatVersion = 1;
constexpr size_t kFingerprintDigits = 32;

constexpr char kNone[] = "none";
constexpr std::pair<const char*, SharingForm> kForms[] = {{"exact", SharingForm::kExact},
                                                          {"scored", SharingForm::kScored}};

// Returns the form that the file names for a cluster, kNone included; "exact" where it names none.
absl::StatusOr<std::string> NamedForm(const json& file, const std::string& id) {
  const auto sharing = file.find("sharing");
  if (sharing == file.end() || !sharing->contains(id)) return kForms[0].first;
  const json& form = (*sharing)[id];
  const bool known = form == kNone || std::any_of(std::begin(kForms), std::end(kForms),
                                                  [&](const auto& f) { return form == f.first; });
  if (known) return form.get<std::string>();
  return absl::InvalidArgumentError(absl::StrCat("sharing of cluster ", Shown(json(id)), " is ",
                                                 Shown(form), ", none of exact, scored, none"));
}

// Checks that `sharing` names forms of clusters that share. "none" may be said of any cluster.
absl::Status CheckForms(const json& file) {
  const auto sharing = file.find("sharing");
  if (sharing == file.end() || sharing->is_null()) return absl::OkStatus();
  if (!sharing->is_object()) return absl::InvalidArgumentError("sharing is not an object");
  const json& shared = file["shared_clusters"];
  for (const auto& [id, form] : sharing->items()) {
    PREFILLD_ASSIGN_OR_RETURN(const std::string name, NamedForm(file, id));
    const bool is_shared = std::find(shared.begin(), shared.end(), id) != shared.end();
    if (!file["clusters"].contains(id) || (!is_shared && name != kNone)) {
      return absl::InvalidArgumentError(absl::StrCat("sharing names ", Shown(json(id)),
                                                     ", which is not among the shared clusters"));
    }
  }
  return absl::OkStatus();
}

// Numbers the clusters that share from 0, in the order in which the file lists them, and appends
// the form of each to `forms`.
absl::StatusOr<std::map<std::string, int>> NumberSharedClusters(const json& file,
                                                                std::vector<SharingForm>& forms) {
  const auto clusters = file.find("clusters");
  if (clusters == file.end() || !clusters->is_object()) {
    return absl::InvalidArgumentError("clusters is missing or not an object");
  }
  const auto shared = file.find("shared_clusters");
  if (shared == file.end() || !shared->is_array()) {
    return absl::InvalidArgumentError("shared_clusters is missing or not an array");
  }
  std::map<std::string, int> number_of;
  std::set<std::string> named;
  for (const json& id : *shared) {
    if (!id.is_string() || !clusters->contains(id.get_ref<const std::string&>())) {
      return absl::InvalidArgumentError(
          absl::StrCat("shared_clusters names ", Shown(id), ", which is not among the clusters"));
    }
    if (!named.insert(id.get<std::string>()).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("shared_clusters names ", Shown(id), " twice"));
    }
  }
  PREFILLD_RETURN_IF_ERROR(CheckForms(file));
  for (const json& id : *shared) {
    PREFILLD_ASSIGN_OR_RETURN(const std::string name, NamedForm(file, id.get<std::string>()));
    for (const auto& [form_name, form] : kForms) {
      if (name != form_name) continue;
      number_of.emplace(id.get<std::string>(), static_cast<int>(number_of.size()));
      forms.push_back(form);
    }
  }
  return number_of;
}

// Reads [layer, head] of a cluster; `taken` marks the heads that have one.
absl::Status AssignHead(const json& head, const std::string& cluster, int number,
                        std::vector<std::vector<bool>>& taken, HeadClusters& result) {
  const bool is_pair = head.is_array() && head.size() == 2 && head[0].is_number_unsigned() &&
                       head[1].is_number_unsigned();
  const size_t num_layers = taken.size();
  const size_t num_heads = taken.front().size();
  if (!is_pair || head[0].get<uint64_t>() >= num_layers || head[1].get<uint64_t>() >= num_heads) {
    return absl::InvalidArgumentError(absl::StrCat("cluster ", Shown(cluster), ": ", Shown(head),
                                                   " is not a [layer, head] of a model with ",
                                                   num_layers, " layers of ", num_heads, " heads"));
  }
  const auto layer = head[0].get<size_t>();
  const auto index = head[1].get<size_t>();
  if (taken[layer][index]) {
    return absl::InvalidArgumentError(
        absl::StrCat("cluster ", Shown(cluster), ": ", Shown(head), " is already in a cluster"));
  }
  taken[layer][index] = true;
  result.cluster_of[layer][index] = number;
  return absl::OkStatus();
}

// Limits are checked here, so that a message names the key of the file.
template <typename Members>
void ReadThreshold(const char* name, const Members& members, ConfigFields& fields,
                   AttentionOverrides& thresholds) {
  using T = typename Members::Value;
  T value;
  if constexpr (std::is_same_v<T, bool>) {
    value = fields.Flag(name, false);
  } else if constexpr (std::is_same_v<T, int64_t>) {
    value = fields.Integer(name, members.lowest, members.highest, members.lowest);
  } else {
    value = static_cast<T>(fields.Number(name, members.lowest, members.highest, members.lowest));
  }
  if (!fields.Has(name)) return;
  if (!members.Contains(value)) {
    fields.Refuse(name, absl::StrCat("is not in ", members.LimitsText()));
  }
  thresholds.*members.named = value;
}

absl::Status ReadThresholds(const json& file, HeadClusters& result) {
  const auto found = file.find("thresholds");
  if (found == file.end() || found->is_null()) return absl::OkStatus();
  if (!found->is_object()) return absl::InvalidArgumentError("thresholds is not an object");
  ConfigFields fields(*found, "thresholds.");
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    if ((threshold.setters & kClusterFile) == 0) continue;
    std::visit(
        [&](const auto& members) {
          ReadThreshold(threshold.name, members, fields, result.thresholds);
        },
        threshold.members);
  }
  return fields.Finish();
}

// Reads what calibration by loss promises. Its other fields are for people.
absl::Status ReadCalibratedLoss(const json& file, HeadClusters& result) {
  const auto found = file.find("calibration");
  if (found == file.end() || !found->is_object() || !found->contains("max_perplexity_rise")) {
    return absl::OkStatus();
  }
  const json measured_or_none = found->value("measured", json::object());
  if (!measured_or_none.is_object()) {
    return absl::InvalidArgumentError("calibration.measured is not an object");
  }
  constexpr double kMostRise = 1e6;
  constexpr int64_t kMost = int64_t{1} << 40;
  CalibratedLoss loss;
  ConfigFields promise(*found, "calibration.");
  loss.max_perplexity_rise = promise.Number("max_perplexity_rise", 0.0, kMostRise);
  loss.shortest_tokens = promise.Integer("shortest_tokens", 1, kMost);
  loss.longest_tokens = promise.Integer("longest_tokens", loss.shortest_tokens, kMost);
  PREFILLD_RETURN_IF_ERROR(promise.status());
  ConfigFields measured(measured_or_none, "calibration.measured.");
  loss.perplexity_rise = measured.Number("perplexity_rise", -1.0, kMostRise);
  loss.standard_error = measured.Number("standard_error", 0.0, kMostRise);
  loss.worst_prompt = measured.Number("worst_prompt", -1.0, kMostRise);
  loss.density = measured.Number("density", 0.0, 1.0);
  loss.prompts = measured.Integer("prompts", 1, kMost);
  PREFILLD_RETURN_IF_ERROR(measured.status());
  result.calibrated_loss = loss;
  return absl::OkStatus();
}

// Reads the fields that say what kind of file this is, and for which model.
absl::Status ReadProvenance(const json& file, HeadClusters& result) {
  ConfigFields fields(file);
  const int64_t version = fields.Integer("format_version", INT64_MIN, INT64_MAX, kFormatVersion);
  if (version != kFormatVersion) {
    fields.Refuse("format_version", absl::StrCat("unsupported; built for ", kFormatVersion));
  }
  result.model_fingerprint = fields.Text("model_fingerprint", "");
  const bool is_fingerprint =
      result.model_fingerprint.size() == kFingerprintDigits &&
      std::all_of(result.model_fingerprint.begin(), result.model_fingerprint.end(),
                  [](char c) { return absl::ascii_isdigit(c) || (c >= 'a' && c <= 'f'); });
  if (fields.Has("model_fingerprint") && !is_fingerprint) {
    fields.Refuse("model_fingerprint",
                  absl::StrCat("is not ", kFingerprintDigits, " lower-case hexadecimal digits"));
  }
  return fields.status();
}

absl::StatusOr<HeadClusters> ReadClusters(const json& file, const ModelConfig& config) {
  std::vector<SharingForm> forms;
  PREFILLD_ASSIGN_OR_RETURN(const auto number_of, NumberSharedClusters(file, forms));

  const auto num_layers = static_cast<size_t>(config.num_layers);
  const auto num_heads = static_cast<size_t>(config.num_heads);
  HeadClusters result;
  PREFILLD_RETURN_IF_ERROR(ReadProvenance(file, result));
  result.num_clusters = static_cast<int>(number_of.size());
  result.forms = std::move(forms);
  result.cluster_of.assign(num_layers, std::vector<int>(num_heads, HeadClusters::kNoCluster));
  std::vector<std::vector<bool>> taken(num_layers, std::vector<bool>(num_heads, false));
  for (const auto& [id, heads] : file["clusters"].items()) {
    if (!heads.is_array()) {
      return absl::InvalidArgumentError(absl::StrCat("cluster ", Shown(id), " is not an array"));
    }
    const auto found = number_of.find(id);
    const int number = found == number_of.end() ? HeadClusters::kNoCluster : found->second;
    for (const json& head : heads) {
      PREFILLD_RETURN_IF_ERROR(AssignHead(head, id, number, taken, result));
    }
  }
  PREFILLD_RETURN_IF_ERROR(ReadThresholds(file, result));
  PREFILLD_RETURN_IF_ERROR(ReadCalibratedLoss(file, result));
  return result;
}

}  // namespace

absl::StatusOr<HeadClusters> LoadHeadClusters(const std::string& path, const ModelConfig& config) {
  PREFILLD_ASSIGN_OR_RETURN(const json file, ReadJsonObject(path, kMaxFileBytes));
  absl::StatusOr<HeadClusters> clusters = ReadClusters(file, config);
  if (!clusters.ok()) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", clusters.status().message()));
  }
  return clusters;
}

absl::Status CheckMadeFor(const HeadClusters& clusters, const std::string& fingerprint) {
  if (clusters.model_fingerprint.empty() || clusters.model_fingerprint == fingerprint) {
    return absl::OkStatus();
  }
  return absl::FailedPreconditionError(absl::StrCat(
      "the head clusters were made for the model with fingerprint ", clusters.model_fingerprint,
      ", but the one loaded has ", fingerprint,
      "; calibrate it, or remove model_fingerprint from the file if its heads are the same"));
}

}  // namespace prefilld::model
