#include "proto/process/problems.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"

namespace prefilld::process {

void AddIfAny(std::optional<std::string> problem, Problems& problems) {
  if (problem.has_value()) problems.push_back(*std::move(problem));
}

void CheckRange(absl::string_view flag, int64_t value, int64_t low, int64_t high,
                Problems& problems) {
  if (value >= low && value <= high) return;
  problems.push_back(absl::StrCat(flag, "=", value, " is outside ", low, " to ", high));
}

void CheckSeconds(absl::string_view flag, absl::Duration value, double high_seconds,
                  Problems& problems) {
  const double seconds = absl::ToDoubleSeconds(value);
  // A value that is not a number fails both comparisons.
  if (seconds > 0 && seconds <= high_seconds) return;
  problems.push_back(absl::StrCat(flag, "=", seconds, " is outside (0, ", high_seconds, "]"));
}

absl::Status ToStatus(const Problems& problems) {
  if (problems.empty()) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrJoin(problems, "; "));
}

}  // namespace prefilld::process
