#include "server/tenant_identity.h"

#include <algorithm>
#include <memory>
#include <utility>
#include <vector>

#include <grpc/grpc_security_constants.h>
#include <grpcpp/security/auth_context.h>
#include <grpcpp/server_context.h>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "proto/status_macros.h"
#include "proto/wire/request_id.h"
#include "server/refusal_cause.h"

namespace prefilld::server {
namespace {

constexpr size_t kMaxKeyBytes = 64;
constexpr std::pair<TenantSource, const char*> kSources[] = {
    {TenantSource::kNone, "none"},
    {TenantSource::kCertificate, "certificate"},
    {TenantSource::kMetadata, "metadata"},
    {TenantSource::kToken, "token"}};

absl::string_view View(grpc::string_ref text) { return {text.data(), text.size()}; }

// Returns the value that the caller sent under the key, or "". A key that comes twice is as good as
// none, because it may be a caller's own beside the gateway's.
absl::string_view MetadataOf(const grpc::ServerContextBase& context, const std::string& key) {
  const auto& metadata = context.client_metadata();
  const auto [first, last] = metadata.equal_range(grpc::string_ref(key));
  return first != last && std::next(first) == last ? View(first->second) : "";
}

// gRPC has verified the certificate of every connection, where it asks for one.
absl::string_view CertificateNameOf(const grpc::AuthContext& peer) {
  if (!peer.IsPeerAuthenticated()) return "";
  for (const char* property : {GRPC_X509_CN_PROPERTY_NAME, GRPC_X509_SAN_PROPERTY_NAME}) {
    const std::vector<grpc::string_ref> names = peer.FindPropertyValues(property);
    if (!names.empty() && !names.front().empty()) return View(names.front());
  }
  return "";
}

absl::string_view TokenOf(const grpc::ServerContextBase& context) {
  absl::string_view value = MetadataOf(context, "authorization");
  constexpr absl::string_view kScheme = "bearer ";
  if (!absl::StartsWithIgnoreCase(value, kScheme)) return "";
  return absl::StripAsciiWhitespace(value.substr(kScheme.size()));
}

// A token that was stolen is of no use beside another certificate than its tenant's.
absl::Status CheckCertificate(const Tenant& tenant, absl::string_view name) {
  const auto& names = tenant.certificates;
  if (names.empty() || std::find(names.begin(), names.end(), name) != names.end()) {
    return absl::OkStatus();
  }
  return Because(RefusalCause::kCertificate,
                 absl::PermissionDeniedError(absl::StrCat(
                     "the certificate's name '", wire::ShownId(name), "' is none of the ",
                     names.size(), " beside which the token counts (certificates)")));
}

absl::StatusOr<size_t> Known(std::optional<size_t> position, const std::string& stranger) {
  if (position.has_value()) return *position;
  return absl::UnauthenticatedError(
      absl::StrCat(stranger, "; this server takes requests of its ", "tenants alone"));
}

}  // namespace

const char* Name(TenantSource source) {
  for (const auto& [known, name] : kSources) {
    if (known == source) return name;
  }
  return "?";
}

std::optional<TenantSource> ParseTenantSource(absl::string_view name) {
  for (const auto& [source, known] : kSources) {
    if (known == name) return source;
  }
  return std::nullopt;
}

Strangers StrangersOf(TenantSource source) {
  return source == TenantSource::kToken ? Strangers::kRefused : Strangers::kDefaultTenant;
}

absl::StatusOr<size_t> TenantOf(const TenantEvidence& evidence, const Tenants& table,
                                const grpc::ServerContextBase& context) {
  switch (evidence.source) {
    case TenantSource::kNone:
      return 0;
    case TenantSource::kCertificate: {
      const std::shared_ptr<const grpc::AuthContext> peer = context.auth_context();
      const absl::string_view name = CertificateNameOf(*peer);
      return Known(table.ByName(name), absl::StrCat("no tenant has the certificate's name '",
                                                    wire::ShownId(name), "'"));
    }
    case TenantSource::kMetadata: {
      const absl::string_view name = MetadataOf(context, evidence.metadata_key);
      return Known(table.ByName(name), absl::StrCat("no tenant has the name '", wire::ShownId(name),
                                                    "' in ", evidence.metadata_key));
    }
    case TenantSource::kToken: {
      const auto tenant =
          Known(table.ByToken(TokenOf(context)), "no tenant has the bearer token in authorization");
      if (!tenant.ok()) return tenant;
      PREFILLD_RETURN_IF_ERROR(
          CheckCertificate(table.all()[*tenant], CertificateNameOf(*context.auth_context())));
      return tenant;
    }
  }
  return 0;
}

Caller CallerOf(const grpc::ServerContextBase& context, bool* trace_ignored) {
  wire::TakenTrace trace = wire::TakeTrace(context);
  *trace_ignored = trace.ignored;
  return {.peer = context.peer(),
          .certificate = wire::ShownId(CertificateNameOf(*context.auth_context())),
          .user_agent = wire::ShownId(MetadataOf(context, "user-agent")),
          .tenant = "",
          .trace = std::move(trace.context)};
}

std::optional<std::string> MetadataKeyProblem(absl::string_view flag, absl::string_view key) {
  const bool spelt = std::all_of(key.begin(), key.end(), [](char c) {
    return absl::ascii_islower(static_cast<unsigned char>(c)) ||
           absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '-' || c == '_' || c == '.';
  });
  if (spelt && !key.empty() && key.size() <= kMaxKeyBytes && !absl::EndsWith(key, "-bin") &&
      !absl::StartsWith(key, "grpc-")) {
    return std::nullopt;
  }
  return absl::StrCat(flag, "=", wire::ShownId(key), " is not of 1 to ", kMaxKeyBytes,
                      " characters a-z 0-9 - _ . without grpc- before or -bin behind them");
}

}  // namespace prefilld::server
