#include "server/job_shares.h"

#include <algorithm>
#include <cstdint>

#include "server/prefill_job.h"
#include "server/tenant_metrics.h"

namespace prefilld::server {
namespace {

Claimant ClaimantOf(const PrefillJob& job) {
  return {.priority = job.work().priority, .tenant = job.work().tenant};
}

std::vector<double> WeightsOf(absl::Span<const Tenant> tenants) {
  std::vector<double> weights;
  for (const Tenant& tenant : tenants) weights.push_back(tenant.weight);
  return weights;
}

}  // namespace

JobShares::JobShares(absl::Span<const Tenant> tenants, TenantMetrics& metrics)
    : metrics_(metrics), shares_(WeightsOf(tenants)) {}

void JobShares::SetTenants(absl::Span<const Tenant> tenants) {
  shares_.SetWeights(WeightsOf(tenants));
}

void JobShares::SetClaimants(absl::Span<const PrefillJob* const> jobs, absl::Time now) {
  std::vector<Claimant> claimants;
  claimants.reserve(jobs.size());
  for (const PrefillJob* job : jobs) claimants.push_back(ClaimantOf(*job));
  shares_.SetClaimants(claimants, now);
}

Contender JobShares::StandingOf(Jobs jobs, absl::Time now) const {
  Contender best{.priority = -kMaxPriority, .tenant_time = absl::InfiniteDuration()};
  for (const auto& job : jobs) {
    if (!job->wanted()) continue;
    const Claimant claimant = ClaimantOf(*job);
    const absl::Duration time = shares_.virtual_time(claimant);
    if (claimant.priority < best.priority) continue;
    if (claimant.priority == best.priority && time >= best.tenant_time) continue;
    best.priority = claimant.priority;
    best.tenant_time = time;
  }
  best.class_waited = shares_.class_waited(best.priority, now);
  best.class_step = shares_.class_step(best.priority);
  return best;
}

absl::Duration JobShares::virtual_time(const PrefillJob& job) const {
  return shares_.virtual_time(ClaimantOf(job));
}

void JobShares::Charge(Jobs jobs, absl::Duration device_time) {
  int64_t all_tokens = 0;
  for (const auto& job : jobs) all_tokens += static_cast<int64_t>(job->work().tokens.size());
  for (const auto& job : jobs) {
    const double part =
        static_cast<double>(job->work().tokens.size()) / static_cast<double>(all_tokens);
    shares_.Charge(ClaimantOf(*job), device_time * part);
    metrics_.CountDeviceTime(static_cast<size_t>(job->work().tenant), device_time * part);
  }
}

// A batch is a step of the class that it was chosen for. If it counted for the classes of the
// others too, a trickle of short prompts would keep a long one of such a class from ever having a
// step.
void JobShares::EndStep(Jobs jobs, absl::Time now, absl::Duration took) {
  int highest = -kMaxPriority;
  for (const auto& job : jobs) highest = std::max(highest, job->work().priority);
  shares_.EndStep(highest, now, took);
}

}  // namespace prefilld::server
