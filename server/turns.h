// The rules by which prompts take turns on the device, as plain functions.
#ifndef PREFILLD_SERVER_TURNS_H_
#define PREFILLD_SERVER_TURNS_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"

namespace prefilld::server {

// A pass under way that could compute its next step, or a waiting prompt that could be started.
struct Contender {
  int priority = 0;  // its class; higher classes go first
  // The time since anyone of its class had a step, or since somebody of the class came.
  absl::Duration class_waited = absl::ZeroDuration();
  // The device time of the latest step of its class.
  absl::Duration class_step = absl::ZeroDuration();
  // The virtual time of its tenant in its class (fair_shares.h).
  absl::Duration tenant_time = absl::ZeroDuration();
  // The predicted time that it still computes.
  absl::Duration remaining = absl::ZeroDuration();
  // The time since its last step or, before the first one, since it came.
  absl::Duration waited = absl::ZeroDuration();
  // The time since it came.
  absl::Duration age = absl::ZeroDuration();
};

enum class Scheduling : uint8_t {
  kTurns,  // OrderOfTurns
  // Whoever came first goes first, with all of its steps. It serves comparisons: neither classes
  // nor tenants count.
  kFifo,
};
const char* Name(Scheduling scheduling);

// The share of its length for which waiting counts (OrderOfTurns).
inline constexpr double kAgeing = 0.05;

// A class that has waited for longer than this, and for longer than kClassPatienceSteps of its
// latest step, goes first for one step.
inline constexpr absl::Duration kClassPatience = absl::Seconds(5);
inline constexpr int kClassPatienceSteps = 10;

// Returns the positions of the contenders in the order in which they should compute, the next one
// first. Classes decide first, then the tenants' virtual times, then the prompts themselves.
//
// The highest class goes first. So that a flood of high classes starves nobody, a class whose
// contenders have seen no step for kClassPatience goes before all others, for one step; of several
// such classes, the one that has waited longest. If its steps are long it waits for
// kClassPatienceSteps of them, so that no more than a tenth of the time goes to one class in this
// way, however long its prompts are. Ageing belongs to the class and not to its prompts, because
// under load all prompts of a long queue are old, and priority would end with that.
//
// Within a class the tenant with the least virtual time goes first.
//
// Within a tenant the least remaining time goes first, because that keeps the mean wait least: a
// short prompt waits for one step of a long one and not for all of it. Waiting counts for
// kAgeing of its length against the remaining time, so nobody starves: a contender that has waited
// for 1 / kAgeing times its remaining time is the next of its tenant in this class, after one turn
// of each of the tenant's contenders that have waited as long. Each of its steps waits anew, so
// under a load that never ends a long prompt waits so long for every layer. That it counts for less
// than its length keeps two long prompts of one length from alternating, which would delay the
// first and help neither. That it counts for far less keeps the steps of the longest prompts from
// delaying those that would be done soon; tests/bench/throughput_at_p99.py tells how much that is.
std::vector<size_t> OrderOfTurns(absl::Span<const Contender> contenders);

// Tells whether `a` comes before `b` in the order that the rule wants.
bool GoesBefore(Scheduling scheduling, const Contender& a, const Contender& b);
// Returns the positions in the order that the rule wants.
std::vector<size_t> OrderOf(Scheduling scheduling, absl::Span<const Contender> contenders);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TURNS_H_
