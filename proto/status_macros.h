// Returns early on an error, for functions that give back absl::Status or absl::StatusOr.
//
// Every room may include this header: it needs nothing but Abseil's statuses. Abseil as Debian 12
// packages it has no such macros of its own.
#ifndef PREFILLD_PROTO_STATUS_MACROS_H_
#define PREFILLD_PROTO_STATUS_MACROS_H_

#include <utility>

#include "absl/base/optimization.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"

// PREFILLD_RETURN_IF_ERROR(expression) evaluates an expression of type absl::Status once, and
// returns it from the calling function unless it is OK.
#define PREFILLD_RETURN_IF_ERROR(expression)                                 \
  do {                                                                       \
    absl::Status prefilld_status_ = (expression);                            \
    if (ABSL_PREDICT_FALSE(!prefilld_status_.ok())) return prefilld_status_; \
  } while (false)

// PREFILLD_ASSIGN_OR_RETURN(target, expression) evaluates an expression of type absl::StatusOr<T>
// once. If it is OK its value is moved to `target`, which may be a declaration; otherwise its
// status is returned from the calling function. A declaration with a comma in it, such as
// std::pair<A, B> x, does not fit: use auto.
#define PREFILLD_ASSIGN_OR_RETURN(target, expression) \
  PREFILLD_ASSIGN_OR_RETURN_(PREFILLD_CONCAT_(prefilld_statusor_, __LINE__), target, expression)

#define PREFILLD_ASSIGN_OR_RETURN_(statusor, target, expression)               \
  auto statusor = (expression);                                                \
  if (ABSL_PREDICT_FALSE(!statusor.ok())) return std::move(statusor).status(); \
  target = *std::move(statusor)

#define PREFILLD_CONCAT_(a, b) PREFILLD_CONCAT_EXPANDED_(a, b)
#define PREFILLD_CONCAT_EXPANDED_(a, b) a##b

#endif  // PREFILLD_PROTO_STATUS_MACROS_H_
