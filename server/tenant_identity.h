// Tells who makes a call.
#ifndef PREFILLD_SERVER_TENANT_IDENTITY_H_
#define PREFILLD_SERVER_TENANT_IDENTITY_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "server/caller.h"
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

// Returns what becomes of strangers where the file of tenants does not say. Whoever hands out
// tokens means that nobody gets in without one.
Strangers StrangersOf(TenantSource source);

// The operator's choice of how tenants are told apart.
struct TenantEvidence {
  TenantSource source = TenantSource::kNone;
  std::string metadata_key = "x-tenant";  // for kMetadata
};

// Returns the position of the tenant in the table. Errors:
// - UNAUTHENTICATED: the caller is none of them, and the operator wants strangers to be refused.
// - PERMISSION_DENIED: a tenant's token came beside a certificate that is not one of the tenant's.
absl::StatusOr<size_t> TenantOf(const TenantEvidence& evidence, const Tenants& table,
                                const grpc::ServerContextBase& context);

// Describes the caller, all but its tenant. `trace_ignored` tells whether its trace context was not
// valid.
Caller CallerOf(const grpc::ServerContextBase& context, bool* trace_ignored);

// Returns nullopt if gRPC carries text under this metadata key. Otherwise returns a sentence that
// says why not and names `flag`, from which the key came.
std::optional<std::string> MetadataKeyProblem(absl::string_view flag, absl::string_view key);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TENANT_IDENTITY_H_
