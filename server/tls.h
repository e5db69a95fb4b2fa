// Credentials from PEM files.
#ifndef PREFILLD_SERVER_TLS_H_
#define PREFILLD_SERVER_TLS_H_

#include <memory>

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include "absl/status/statusor.h"
#include "server/server_options.h"

namespace prefilld::server {

// Plain text without a certificate. INVALID_ARGUMENT: a file cannot be read.
absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const TlsFiles& files);

// For the calls to receivers of pushed KV: TLS when the server itself has it, presenting the
// server's certificate; receivers are trusted by client_ca, or by the system's roots without one.
absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakePushCredentials(
    const TlsFiles& files);

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TLS_H_
