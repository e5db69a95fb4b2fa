// Tells which tenant a call comes from.
#ifndef PREFILLD_SERVER_TENANT_IDENTITY_H_
#define PREFILLD_SERVER_TENANT_IDENTITY_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/tenants.h"

namespace grpc {
class ServerContextBase;
}

namespace prefilld::server {

// The evidence that tells tenants apart.
enum class TenantSource : uint8_t {
  kNone,         // all calls belong to the default tenant
  kCertificate,  // the common name of the caller's verified certificate, else its first alternative
                 // name
  kMetadata,     // metadata that a trusted gateway sets
  kToken,        // metadata "authorization: Bearer TOKEN"
};

const char* Name(TenantSource source);
std::optional<TenantSource> ParseTenantSource(absl::string_view name);

// The operator's choice of how tenants are told apart, and the table of them.
struct TenantIdentity {
  TenantSource source = TenantSource::kNone;
  std::string metadata_key = "x-tenant";  // for kMetadata
  Tenants table;
};

// Returns the position of the tenant in the table. UNAUTHENTICATED: the caller is none of them, and
// the operator wants strangers to be refused.
absl::StatusOr<size_t> TenantOf(const TenantIdentity& identity,
                                const grpc::ServerContextBase& context);

// Returns nullopt if gRPC carries text under this metadata key. Otherwise returns a sentence that
// says why not and names `flag`, from which the key came.
std::optional<std::string> MetadataKeyProblem(absl::string_view flag, absl::string_view key);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANT_IDENTITY_H_
