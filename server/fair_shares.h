// Weighted fair queueing over device time: how far each tenant has come in the use of its share.
#ifndef PREFILLD_SERVER_FAIR_SHARES_H_
#define PREFILLD_SERVER_FAIR_SHARES_H_

#include <array>
#include <cstddef>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"

namespace prefilld::server {

// The classes of requests are -kMaxPriority to kMaxPriority; 0 is that of requests that ask for
// none.
inline constexpr int kMaxPriority = 7;

// Somebody who has something to compute.
struct Claimant {
  int priority = 0;
  int tenant = 0;  // its position among the tenants
};

// In each class every tenant has a virtual time, which advances by the device time of its steps
// divided by its weight. Whoever is always given the tenant with the least virtual time (turns.h)
// divides the time of the class by the weights. Classes keep apart what a tenant used in them,
// because otherwise a tenant that always has urgent work would never come to its other work.
//
// A tenant that was idle in a class joins it at the least virtual time of those that were not, so
// idleness saves up nothing, and what a tenant used while nobody else wanted it is not held against
// it. A class in which nobody waits forgets everything.
//
// Not thread-safe.
class FairShares {
 public:
  // `weights` are positive, one for each tenant.
  explicit FairShares(std::vector<double> weights);

  // Changes weights from now on, and adds tenants behind those that there are; none may go.
  void SetWeights(std::vector<double> weights);

  // Tells who has something to compute now. Has to be called before each turn.
  void SetClaimants(absl::Span<const Claimant> claimants, absl::Time now);

  // Records that the tenant was given so much time of the device, in that class.
  void Charge(const Claimant& claimant, absl::Duration device_time);
  // Records that the class had a step, which took so much time of the device and ended now.
  void EndStep(int priority, absl::Time now, absl::Duration took);

  absl::Duration virtual_time(const Claimant& claimant) const;
  // Returns the time since the class had a step or, if that is later, since it had no claimant.
  absl::Duration class_waited(int priority, absl::Time now) const;
  // Returns the device time of the latest step of the class. Zero: it had none since it had no
  // claimant.
  absl::Duration class_step(int priority) const { return Of(priority).latest_step; }

 private:
  struct Class {
    std::vector<absl::Duration> virtual_times;  // [tenants]
    std::vector<bool> claims;                   // [tenants]
    std::vector<bool> claimed_before;           // [tenants], at the turn before
    absl::Time waits_since = absl::InfiniteFuture();
    absl::Duration latest_step;
  };

  void Admit(Class& of, absl::Time now) const;
  Class& Of(int priority) { return classes_[static_cast<size_t>(priority + kMaxPriority)]; }
  const Class& Of(int priority) const {
    return classes_[static_cast<size_t>(priority + kMaxPriority)];
  }

  std::vector<double> weights_;
  std::array<Class, 2 * kMaxPriority + 1> classes_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_FAIR_SHARES_H_
