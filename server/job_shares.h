// The shares of the device (fair_shares.h) as jobs use them: alone, or several in one pass.
#ifndef PREFILLD_SERVER_JOB_SHARES_H_
#define PREFILLD_SERVER_JOB_SHARES_H_

#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/fair_shares.h"
#include "server/tenants.h"
#include "server/turns.h"

namespace prefilld::server {

class PrefillJob;
class TenantMetrics;

// Not thread-safe.
class JobShares {
 public:
  using Jobs = absl::Span<const std::shared_ptr<PrefillJob>>;

  // `metrics` is borrowed; what is charged is counted there.
  JobShares(absl::Span<const Tenant> tenants, TenantMetrics& metrics);

  // Takes over new weights, and new tenants behind those that there are.
  void SetTenants(absl::Span<const Tenant> tenants);

  // Tells which jobs have something to compute now. Has to be called before each turn.
  void SetClaimants(absl::Span<const PrefillJob* const> jobs, absl::Time now);

  // Describes jobs that compute together by the one of them that goes first by class and tenant.
  // Returns its class, its class's wait and latest step, and its tenant's virtual time. The
  // prompts' own times, `remaining` and `waited`, are left at zero.
  Contender StandingOf(Jobs jobs, absl::Time now) const;
  absl::Duration virtual_time(const PrefillJob& job) const;

  // Charges a time of the device to the tenants of the jobs that used it, by their tokens.
  void Charge(Jobs jobs, absl::Duration device_time);
  // Records that the highest class among these jobs had a step, which took so much time of the
  // device and ended now.
  void EndStep(Jobs jobs, absl::Time now, absl::Duration took);

 private:
  TenantMetrics& metrics_;
  FairShares shares_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_JOB_SHARES_H_
