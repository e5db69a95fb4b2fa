#include "proto/wire/tls.h"

#include <fstream>
#include <iterator>
#include <utility>

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::wire {

const char* ServerTls::mode() const {
  if (cert_file.empty()) return "off";
  return client_ca_file.empty() ? "on" : "mutual";
}

absl::StatusOr<std::string> ReadPemFile(const char* field, const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path, std::ios::binary);
  // A folder opens like a file. This read fails on it, while the iterator's would throw.
  file.peek();
  std::string pem;
  if (file.good()) pem.assign(std::istreambuf_iterator<char>(file), {});
  if (pem.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(field, " ", path, " cannot be read"));
  }
  return pem;
}

void CheckServerTls(const ServerTls& tls, std::vector<std::string>& problems) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    problems.push_back("--tls_cert and --tls_key belong together: one is set, the other is not");
  }
  if (!tls.client_ca_file.empty() && tls.cert_file.empty()) {
    problems.push_back("--tls_client_ca needs --tls_cert and --tls_key");
  }
  for (const auto& [flag, path] :
       {std::pair("--tls_cert", &tls.cert_file), std::pair("--tls_key", &tls.key_file),
        std::pair("--tls_client_ca", &tls.client_ca_file)}) {
    if (ReadPemFile(flag, *path).ok()) continue;
    problems.push_back(absl::StrCat(flag, "=", *path, " cannot be read"));
  }
}

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const ServerTls& tls) {
  if (tls.cert_file.empty()) return grpc::InsecureServerCredentials();
  grpc::SslServerCredentialsOptions ssl(
      tls.client_ca_file.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                                 : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  auto& pair = ssl.pem_key_cert_pairs.emplace_back();
  PREFILLD_ASSIGN_OR_RETURN(pair.cert_chain, ReadPemFile("--tls_cert", tls.cert_file));
  PREFILLD_ASSIGN_OR_RETURN(pair.private_key, ReadPemFile("--tls_key", tls.key_file));
  PREFILLD_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPemFile("--tls_client_ca", tls.client_ca_file));
  return grpc::SslServerCredentials(ssl);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const std::optional<ChannelTls>& tls) {
  if (!tls.has_value()) return grpc::InsecureChannelCredentials();
  if (tls->cert_file.empty() != tls->key_file.empty()) {
    return absl::InvalidArgumentError("TLS cert_file and key_file go together; only one is set");
  }
  grpc::SslCredentialsOptions ssl;
  PREFILLD_ASSIGN_OR_RETURN(ssl.pem_root_certs, ReadPemFile("TLS ca_file", tls->ca_file));
  PREFILLD_ASSIGN_OR_RETURN(ssl.pem_cert_chain, ReadPemFile("TLS cert_file", tls->cert_file));
  PREFILLD_ASSIGN_OR_RETURN(ssl.pem_private_key, ReadPemFile("TLS key_file", tls->key_file));
  return grpc::SslCredentials(ssl);
}

}  // namespace prefilld::wire
