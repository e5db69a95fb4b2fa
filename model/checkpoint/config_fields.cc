#include "model/checkpoint/config_fields.h"

#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "model/checkpoint/strict_json.h"

namespace prefilld::model {

using nlohmann::json;

const json* ConfigFields::Find(absl::string_view name) const {
  const auto found = object_.find(std::string(name));
  return found == object_.end() || found->is_null() ? nullptr : &*found;
}

bool ConfigFields::Mentions(const std::string& name) const { return object_.contains(name); }

const json* ConfigFields::Require(const std::string& name, bool required) {
  known_.insert(name);
  const json* value = Find(name);
  if (value == nullptr && required) {
    Fail(absl::InvalidArgumentError(absl::StrCat(prefix_, name, " is missing")));
  }
  return value;
}

int64_t ConfigFields::Integer(const std::string& name, int64_t min, int64_t max,
                              std::optional<int64_t> absent) {
  const json* value = Require(name, !absent);
  if (value == nullptr) return absent.value_or(min);
  const std::optional<int64_t> number = WholeNumber(*value);
  if (number && *number >= min && *number <= max) return *number;
  Refuse(name, absl::StrCat("is not an integer in [", min, ", ", max, "]"));
  return absent.value_or(min);
}

double ConfigFields::Number(const std::string& name, double min, double max,
                            std::optional<double> absent) {
  const json* value = Require(name, !absent);
  if (value == nullptr) return absent.value_or(min);
  if (value->is_number()) {
    const double number = value->get<double>();
    if (number >= min && number <= max) return number;
  }
  Refuse(name, absl::StrCat("is not a number in [", min, ", ", max, "]"));
  return absent.value_or(min);
}

bool ConfigFields::Flag(const std::string& name, bool absent) {
  const json* value = Require(name, false);
  if (value == nullptr) return absent;
  if (value->is_boolean()) return value->get<bool>();
  Refuse(name, "is not true or false");
  return absent;
}

std::string ConfigFields::Text(const std::string& name, absl::string_view absent) {
  const json* value = Require(name, false);
  if (value == nullptr) return std::string(absent);
  if (value->is_string()) return value->get<std::string>();
  Refuse(name, "is not a string");
  return std::string(absent);
}

const json* ConfigFields::Value(const std::string& name) { return Require(name, false); }

void ConfigFields::Ignore(std::initializer_list<absl::string_view> names) {
  for (absl::string_view name : names) {
    known_.emplace(name);
    if (Has(name)) NoteIgnored(absl::StrCat(prefix_, name));
  }
}

void ConfigFields::Refuse(absl::string_view name, absl::string_view reason) {
  const json* value = Find(name);
  Fail(absl::InvalidArgumentError(
      absl::StrCat(prefix_, name, " ", value ? Shown(*value) : "(absent)", " ", reason)));
}

void ConfigFields::Fail(absl::Status status) {
  if (status_.ok()) status_ = std::move(status);
}

void ConfigFields::RefuseUnknown(const std::vector<std::string>& names) {
  const auto add = [this](std::string* out, const std::string& name) {
    absl::StrAppend(out, prefix_, name);
  };
  std::string others;
  if (names.size() > 1) {
    others = absl::StrCat("; so are ", absl::StrJoin(names.begin() + 1, names.end(), ", ", add));
  }
  Refuse(names.front(),
         absl::StrCat("unsupported: unknown to prefilld, and may change what the model computes",
                      others, ". Where it does not, --ignore_config=",
                      absl::StrJoin(names, ",", add), " leaves it out"));
}

absl::Status ConfigFields::Finish() {
  std::vector<std::string> unknown;
  for (const auto& [name, value] : object_.items()) {
    if (known_.contains(name) || value.is_null()) continue;
    const bool asks_nothing = value == false || (!value.is_primitive() && value.empty());
    if (asks_nothing) {
      NoteIgnored(absl::StrCat(prefix_, name));
    } else {
      unknown.push_back(name);
    }
  }
  if (!unknown.empty()) RefuseUnknown(unknown);
  return status_;
}

}  // namespace prefilld::model
