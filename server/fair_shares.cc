#include "server/fair_shares.h"

#include <algorithm>
#include <utility>

namespace prefilld::server {

FairShares::FairShares(std::vector<double> weights) { SetWeights(std::move(weights)); }

void FairShares::SetWeights(std::vector<double> weights) {
  weights_ = std::move(weights);
  for (Class& of : classes_) {
    of.virtual_times.resize(weights_.size());
    of.claims.resize(weights_.size());
    of.claimed_before.resize(weights_.size());
  }
}

void FairShares::SetClaimants(absl::Span<const Claimant> claimants, absl::Time now) {
  for (Class& of : classes_) {
    of.claims.swap(of.claimed_before);
    std::fill(of.claims.begin(), of.claims.end(), false);
  }
  for (const Claimant& claimant : claimants) {
    Of(claimant.priority).claims[static_cast<size_t>(claimant.tenant)] = true;
  }
  for (Class& of : classes_) Admit(of, now);
}

// Sets the virtual times of those that join a class, or of all when nobody goes on.
void FairShares::Admit(Class& of, absl::Time now) const {
  absl::Duration least = absl::InfiniteDuration();  // of those that go on
  bool had_claimants = false;
  for (size_t t = 0; t < weights_.size(); ++t) {
    if (of.claims[t] && of.claimed_before[t]) least = std::min(least, of.virtual_times[t]);
    had_claimants = had_claimants || of.claimed_before[t];
  }
  if (!had_claimants) {
    of.waits_since = now;
    of.latest_step = absl::ZeroDuration();
  }
  for (size_t t = 0; t < weights_.size(); ++t) {
    if (least == absl::InfiniteDuration()) {
      of.virtual_times[t] = absl::ZeroDuration();
    } else if (of.claims[t] && !of.claimed_before[t]) {
      of.virtual_times[t] = std::max(of.virtual_times[t], least);
    }
  }
}

void FairShares::Charge(const Claimant& claimant, absl::Duration device_time) {
  const auto tenant = static_cast<size_t>(claimant.tenant);
  Of(claimant.priority).virtual_times[tenant] += device_time / weights_[tenant];
}

void FairShares::EndStep(int priority, absl::Time now, absl::Duration took) {
  Of(priority).waits_since = now;
  Of(priority).latest_step = took;
}

absl::Duration FairShares::virtual_time(const Claimant& claimant) const {
  return Of(claimant.priority).virtual_times[static_cast<size_t>(claimant.tenant)];
}

absl::Duration FairShares::class_waited(int priority, absl::Time now) const {
  return now - Of(priority).waits_since;
}

}  // namespace prefilld::server
