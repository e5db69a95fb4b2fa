// The limits of one tenant, as plain rules. The scheduler applies them under its lock.
#ifndef PREFILLD_SERVER_TENANT_LIMITS_H_
#define PREFILLD_SERVER_TENANT_LIMITS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/tenants.h"

namespace prefilld::server {

// The work that a tenant has under way at one moment.
struct TenantUse {
  int64_t requests = 0;       // whose callers cannot know yet that they are over
  int64_t queued_tokens = 0;  // of its prompts that wait
};

// Returns RESOURCE_EXHAUSTED, naming the tenant, the value and the limit, when a prompt of
// `num_tokens` would break a limit of the tenant: its requests, or its tokens that wait.
absl::Status CheckTenantUse(const Tenant& tenant, const TenantUse& use, int64_t num_tokens);

// The tokens that a tenant may still spend. They come back at its rate, up to those of
// kBurstSeconds. A prompt may be longer than that: it needs a full bucket and leaves a debt, so
// that the rate holds on average for prompts of all lengths. Not thread-safe.
class TokenBucket {
 public:
  static constexpr double kBurstSeconds = 10;

  // A rate of 0 sets no limit.
  explicit TokenBucket(double tokens_per_second);

  // Returns how long a prompt has to wait until it may be paid for; zero: it may be now.
  absl::Duration WaitFor(int64_t num_tokens, absl::Time now) const;
  void Take(int64_t num_tokens, absl::Time now);

 private:
  double Level(absl::Time now) const;

  double rate_;
  double level_;  // at `since_`
  absl::Time since_ = absl::InfinitePast();
};

// Returns RESOURCE_EXHAUSTED as CheckTenantUse when the prompt may not be paid for yet.
absl::Status CheckTenantRate(const Tenant& tenant, const TokenBucket& bucket, int64_t num_tokens,
                             absl::Time now);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANT_LIMITS_H_
