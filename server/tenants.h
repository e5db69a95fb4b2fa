// The tenants among whom an operator divides the server, and the limits of each as plain rules,
// which the scheduler applies under its lock.
#ifndef PREFILLD_SERVER_TENANTS_H_
#define PREFILLD_SERVER_TENANTS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "model/sparse/attention_policy.h"

namespace prefilld::server {

// The name of the tenant to whom the requests of all others belong.
inline constexpr absl::string_view kDefaultTenant = "default";

// One tenant, as the operator's file describes it. The limits are off when they are 0.
struct Tenant {
  std::string name{kDefaultTenant};
  double weight = 1;              // its share of the device, in proportion to those of the others
  int max_priority = 0;           // the highest class that its requests may have
  int64_t max_requests = 0;       // under way at once: waiting, computing, being sent
  int64_t max_queued_tokens = 0;  // waiting at once; one prompt may always wait
  double tokens_per_second = 0;   // of prompts that are taken in, on average

  // Its requests may ask for this, within what the server allows all (tenant_rules.h).
  std::vector<model::AttentionPolicy> policies = {};  // empty: every one
  int max_lanes = 0;                                  // of a call; 0: as many as the server has
  bool pushes = true;                                 // whether KV may be pushed for it
  std::vector<std::string> deliver_to = {};           // patterns of whom to push to; empty: anyone

  // Names of the certificates beside which its tokens count; empty: any, or none.
  std::vector<std::string> certificates = {};

  // It is no longer in the file. Requests that it has under way go on; nobody new is this tenant.
  bool is_gone = false;
};

// The fate of a caller who is none of the tenants.
enum class Strangers : uint8_t {
  kDefaultTenant,  // all of them together are one tenant
  kRefused,
};

// The tenants of one version of the operator's file, each with a position. Immutable.
class Tenants {
 public:
  static constexpr size_t kMaxTenants = 256;
  // Names that a process may see in all the versions of its file.
  static constexpr size_t kMaxPositions = 1024;
  static constexpr size_t kMaxNameBytes = 128;

  // Makes a table of the default tenant alone, without limits.
  Tenants();

  // Reads a table from JSON. deploy/README.md describes the format. `unless_said` holds where the
  // JSON does not say what strangers get. INVALID_ARGUMENT names the tenant, the field, the value
  // and the limit of everything that is wrong with it.
  static absl::StatusOr<Tenants> Parse(absl::string_view json,
                                       Strangers unless_said = Strangers::kDefaultTenant);
  // Reads the file. NOT_FOUND: it cannot be read. Otherwise as Parse.
  static absl::StatusOr<Tenants> Read(const std::string& path, Strangers unless_said);

  // Returns this table with every tenant of `before` at the position that it has there; those that
  // this file has no more are gone, and new ones follow. So what is counted by position goes on.
  // RESOURCE_EXHAUSTED: that would be more than kMaxPositions.
  absl::StatusOr<Tenants> InPositionsOf(const Tenants& before) const;

  absl::Span<const Tenant> all() const { return all_; }
  // Returns the position of the tenant with that name, or that shows this bearer token. Somebody
  // else is the default tenant; nullopt if those are refused. No text at all is nobody's token.
  std::optional<size_t> ByName(absl::string_view name) const;
  std::optional<size_t> ByToken(absl::string_view token) const;

  bool has_tokens() const { return !by_token_.empty(); }
  // Returns the version (wire::FileVersions) of the file that Read has read, or of one before that.
  const std::string& file_version() const { return file_version_; }

 private:
  std::vector<Tenant> all_;
  std::optional<size_t> default_;  // nullopt: strangers are refused
  absl::flat_hash_map<std::string, size_t> by_name_;
  absl::flat_hash_map<std::string, size_t> by_token_;  // by the SHA-256 in hexadecimal digits
  std::string file_version_;
};

// The work that a tenant has under way at one moment.
struct TenantUse {
  int64_t requests = 0;       // whose callers cannot know yet that they are over
  int64_t queued_tokens = 0;  // of its prompts that wait
};

// Returns RESOURCE_EXHAUSTED, naming the tenant, the value and the limit, when a prompt of
// `num_tokens` would break a limit of the tenant: its requests, or its tokens that wait.
absl::Status CheckTenantUse(const Tenant& tenant, const TenantUse& use, int64_t num_tokens,
                            int64_t num_requests = 1);

// The tokens that a tenant may still spend. They come back at its rate, up to those of
// kBurstSeconds. A prompt may be longer than that: it needs a full bucket and leaves a debt, so
// that the rate holds on average for prompts of all lengths. Not thread-safe.
class TokenBucket {
 public:
  static constexpr double kBurstSeconds = 10;

  // A rate of 0 sets no limit.
  explicit TokenBucket(double tokens_per_second);

  // Changes the rate from now on. A debt stays; whoever had no limit starts with a full bucket.
  void SetRate(double tokens_per_second, absl::Time now);

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

#endif  // PREFILLD_SERVER_TENANTS_H_
