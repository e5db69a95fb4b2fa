// Checks of what an operator sets. All problems are collected, so that all can be told at once.
#ifndef PREFILLD_PROTO_PROCESS_PROBLEMS_H_
#define PREFILLD_PROTO_PROCESS_PROBLEMS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace prefilld::process {

// Each is one sentence that names the flag, its value and what is allowed.
using Problems = std::vector<std::string>;

void AddIfAny(std::optional<std::string> problem, Problems& problems);
void CheckRange(absl::string_view flag, int64_t value, int64_t low, int64_t high,
                Problems& problems);
// Adds a problem unless `value` is more than 0 and at most `high_seconds`.
void CheckSeconds(absl::string_view flag, absl::Duration value, double high_seconds,
                  Problems& problems);

// Returns OK if there are no problems, otherwise INVALID_ARGUMENT with all of them, separated by ";
// ".
absl::Status ToStatus(const Problems& problems);

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_PROBLEMS_H_
