// Where passes under way and prompts that wait stand when a turn is taken.
#ifndef PREFILLD_SERVER_STANDINGS_H_
#define PREFILLD_SERVER_STANDINGS_H_

#include <cstddef>
#include <memory>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/job_shares.h"
#include "server/prompt_speed.h"
#include "server/turns.h"

namespace prefilld::model {
struct EngineInfo;
}

namespace prefilld::server {

class PrefillJob;
class PrefillPass;

// Describes contenders for the device (turns.h) by the shares of their tenants and by the time that
// they still need, and puts them in order. Not thread-safe.
class Standings {
 public:
  // `engine` and `metrics` are borrowed.
  Standings(const model::EngineInfo& engine, absl::Span<const Tenant> tenants,
            TenantMetrics& metrics, Scheduling scheduling);

  JobShares& shares() { return shares_; }
  StepCost& costs() { return costs_; }

  // Learns from a whole layer that was computed.
  void RecordLayer(const PrefillPass& pass, absl::Duration layer);

  Contender OfPass(const PrefillPass& pass, absl::Time last_step_at, absl::Time now) const;
  Contender OfWaiting(const std::shared_ptr<PrefillJob>& job, absl::Time now) const;
  bool GoesBefore(const Contender& a, const Contender& b) const {
    return server::GoesBefore(scheduling_, a, b);
  }
  // Returns the positions of the contenders, the next one first.
  std::vector<size_t> Order(absl::Span<const Contender> contenders) const {
    return OrderOf(scheduling_, contenders);
  }

 private:
  const model::EngineInfo& engine_;
  const Scheduling scheduling_;
  JobShares shares_;
  StepCost costs_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_STANDINGS_H_
