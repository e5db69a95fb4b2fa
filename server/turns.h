// The rule by which prompts take turns on the device, as a plain function.
#ifndef PREFILLD_SERVER_TURNS_H_
#define PREFILLD_SERVER_TURNS_H_

#include <cstddef>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"

namespace prefilld::server {

// A pass under way that could compute its next step, or a waiting prompt that could be started.
struct Contender {
  // The predicted time that it still computes.
  absl::Duration remaining = absl::ZeroDuration();
  // The time since its last step or, before the first one, since it came.
  absl::Duration waited = absl::ZeroDuration();
};

// Returns the positions of the contenders in the order in which they should compute, the next one
// first.
//
// The least remaining time goes first, because that keeps the mean wait least: a short prompt waits
// for one step of a long one and not for all of it. Waiting counts for half of its length against
// the remaining time, so nobody starves: whatever else comes, a contender gets a step after at most
// twice its remaining time, plus one turn of each contender that has waited as long. The half keeps
// two long prompts of one length from alternating, which would delay the first and help neither.
std::vector<size_t> OrderOfTurns(absl::Span<const Contender> contenders);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TURNS_H_
