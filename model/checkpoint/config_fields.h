// Reads the fields of a config.json so that none is overlooked.
#ifndef PREFILLD_MODEL_CHECKPOINT_CONFIG_FIELDS_H_
#define PREFILLD_MODEL_CHECKPOINT_CONFIG_FIELDS_H_

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace prefilld::model {

// One JSON object, read field by field. The first error is kept and later reads return defaults, so
// that a reader is a list of fields with one check at its end. Null counts as absent. `object` must
// outlive this.
//
// It has a method for each kind of field and for each thing that may be done about one: read it,
// ignore it, refuse it.
class ConfigFields {
 public:
  // `prefix` precedes names in messages, such as "rope_scaling.".
  explicit ConfigFields(const nlohmann::json& object, std::string prefix = "")
      : object_(object), prefix_(std::move(prefix)) {}

  bool Has(absl::string_view name) const { return Find(name) != nullptr; }
  // Tells whether the field is there, null included.
  bool Mentions(const std::string& name) const;

  // Reads a number within inclusive bounds. A field without a default must be there. 2048.0 is an
  // integer too, because some writers know floating-point numbers only.
  int64_t Integer(const std::string& name, int64_t min, int64_t max,
                  std::optional<int64_t> absent = std::nullopt);
  double Number(const std::string& name, double min, double max,
                std::optional<double> absent = std::nullopt);
  bool Flag(const std::string& name, bool absent);
  std::string Text(const std::string& name, absl::string_view absent);
  // Returns the raw value, or null when it is absent.
  const nlohmann::json* Value(const std::string& name);

  // Tells whether the field was asked for or ignored.
  bool WasRead(absl::string_view name) const { return known_.contains(name); }

  // Ignores fields that cannot change the result. Those that are there are noted.
  void Ignore(std::initializer_list<absl::string_view> names);
  // Notes something that was left out of account.
  void NoteIgnored(std::string what) { ignored_.push_back(std::move(what)); }
  // Returns what was ignored, with the prefix, in the order of the calls.
  const std::vector<std::string>& ignored() const { return ignored_; }

  // Records the error "<prefix><name> <value> <reason>".
  void Refuse(absl::string_view name, absl::string_view reason);
  void Fail(absl::Status status);

  const absl::Status& status() const { return status_; }  // the first error so far

  // Returns the first error, or else an error that names all fields that were neither read nor
  // ignored, because they might ask for something that is not done. False, [] and {} ask for
  // nothing, and such fields are ignored.
  absl::Status Finish();

 private:
  const nlohmann::json* Find(absl::string_view name) const;
  const nlohmann::json* Require(const std::string& name, bool required);
  void RefuseUnknown(const std::vector<std::string>& names);

  const nlohmann::json& object_;
  const std::string prefix_;
  std::set<std::string, std::less<>> known_;
  std::vector<std::string> ignored_;
  absl::Status status_;
};

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_CHECKPOINT_CONFIG_FIELDS_H_
