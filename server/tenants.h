// The tenants among whom an operator divides the server, and what each of them may have.
#ifndef PREFILLD_SERVER_TENANTS_H_
#define PREFILLD_SERVER_TENANTS_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

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
};

// A number of tenants that does not change while the server runs, each with a position. Immutable.
class Tenants {
 public:
  static constexpr size_t kMaxTenants = 256;
  static constexpr size_t kMaxNameBytes = 128;

  // Makes a table of the default tenant alone, without limits.
  Tenants();

  // Reads a table from JSON. deploy/README.md describes the format. INVALID_ARGUMENT names the
  // tenant, the field, the value and the limit of everything that is wrong with it.
  static absl::StatusOr<Tenants> Parse(absl::string_view json);
  // Reads the file. NOT_FOUND: it cannot be read. Otherwise as Parse.
  static absl::StatusOr<Tenants> Read(const std::string& path);

  absl::Span<const Tenant> all() const { return all_; }
  // Returns the position of the tenant with that name, or that shows this bearer token. Somebody
  // else is the default tenant; nullopt if the operator wants those to be refused.
  std::optional<size_t> ByName(absl::string_view name) const;
  std::optional<size_t> ByToken(absl::string_view token) const;

  bool has_tokens() const { return !by_token_.empty(); }

 private:
  std::vector<Tenant> all_;
  std::optional<size_t> default_;  // nullopt: strangers are refused
  absl::flat_hash_map<std::string, size_t> by_name_;
  absl::flat_hash_map<std::string, size_t> by_token_;  // by the SHA-256 in hexadecimal digits
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANTS_H_
