#include "server/tenant_limits.h"

#include <algorithm>

#include "absl/strings/str_cat.h"

namespace prefilld::server {

absl::Status CheckTenantUse(const Tenant& tenant, const TenantUse& use, int64_t num_tokens) {
  if (tenant.max_requests > 0 && use.requests >= tenant.max_requests) {
    return absl::ResourceExhaustedError(absl::StrCat("tenant ", tenant.name, ": ", use.requests,
                                                     " requests are under way; at most ",
                                                     tenant.max_requests, " (max_requests)"));
  }
  if (tenant.max_queued_tokens > 0 && use.queued_tokens > 0 &&
      use.queued_tokens + num_tokens > tenant.max_queued_tokens) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "tenant ", tenant.name, ": ", use.queued_tokens, " tokens wait and ", num_tokens,
        " came; at most ", tenant.max_queued_tokens, " (max_queued_tokens)"));
  }
  return absl::OkStatus();
}

TokenBucket::TokenBucket(double tokens_per_second)
    : rate_(tokens_per_second), level_(kBurstSeconds * tokens_per_second) {}

double TokenBucket::Level(absl::Time now) const {
  const double full = kBurstSeconds * rate_;
  if (since_ == absl::InfinitePast()) return full;
  return std::min(full, level_ + rate_ * absl::ToDoubleSeconds(now - since_));
}

absl::Duration TokenBucket::WaitFor(int64_t num_tokens, absl::Time now) const {
  if (rate_ <= 0) return absl::ZeroDuration();
  const double needed = std::min(static_cast<double>(num_tokens), kBurstSeconds * rate_);
  const double missing = needed - Level(now);
  return missing <= 0 ? absl::ZeroDuration()
                      : absl::Ceil(absl::Seconds(missing / rate_), absl::Milliseconds(1));
}

void TokenBucket::Take(int64_t num_tokens, absl::Time now) {
  level_ = Level(now) - static_cast<double>(num_tokens);
  since_ = now;
}

absl::Status CheckTenantRate(const Tenant& tenant, const TokenBucket& bucket, int64_t num_tokens,
                             absl::Time now) {
  const absl::Duration wait = bucket.WaitFor(num_tokens, now);
  if (wait == absl::ZeroDuration()) return absl::OkStatus();
  return absl::ResourceExhaustedError(absl::StrCat(
      "tenant ", tenant.name, ": ", num_tokens, " tokens came ", absl::FormatDuration(wait),
      " too soon; at most ", tenant.tokens_per_second, " a second (tokens_per_second)"));
}

}  // namespace prefilld::server
