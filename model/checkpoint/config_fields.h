// Reads the fields of a config.json so that none is overlooked.
#ifndef PREFILLD_MODEL_CHECKPOINT_CONFIG_FIELDS_H_
#define PREFILLD_MODEL_CHECKPOINT_CONFIG_FIELDS_H_

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace prefilld::model {

// One JSON object, read field by field. The first error is kept and later reads return defaults, so
// that a reader is a list of fields with one check at its end. Null counts as absent. `object` must
// outlive this.
class ConfigFields {
 public:
  // `prefix` precedes names in messages, such as "rope_scaling.".
  explicit ConfigFields(const nlohmann::json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  bool Has(absl::string_view name) const { return Find(name) != nullptr; }
  // Tells whether the field is there, null included.
  bool Mentions(const std::string& name) const;

  // Reads a number within inclusive bounds. A field without a default must be there.
  int64_t Integer(const std::string& name, int64_t min, int64_t max,
                  std::optional<int64_t> absent = std::nullopt);
  double Number(const std::string& name, double min, double max,
                std::optional<double> absent = std::nullopt);
  bool Flag(const std::string& name, bool absent);
  std::string Text(const std::string& name, absl::string_view absent);
  // Returns the raw value, or null when it is absent.
  const nlohmann::json* Value(const std::string& name);

  // Ignores fields that cannot change the result.
  void Ignore(std::initializer_list<absl::string_view> names);

  // Records the error "<prefix><name> <value> <reason>".
  void Refuse(absl::string_view name, absl::string_view reason);
  void Fail(absl::Status status);

  const absl::Status& status() const { return status_; }  // the first error so far

  // Returns the first error, or else an error that names a field that was neither read nor ignored,
  // because it might ask for something that is not done. False, [] and {} ask for nothing.
  absl::Status Finish();

 private:
  const nlohmann::json* Find(absl::string_view name) const;
  const nlohmann::json* Require(const std::string& name, bool required);

  const nlohmann::json& object_;
  const std::string prefix_;
  std::set<std::string, std::less<>> known_;
  absl::Status status_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_CONFIG_FIELDS_H_
