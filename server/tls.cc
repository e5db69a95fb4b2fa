#include "server/tls.h"

#include <fstream>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"

namespace prefilld::server {
namespace {

struct TlsContents {
  std::string certificate;
  std::string private_key;
  std::string client_ca;
};

absl::StatusOr<std::string> ReadFile(const std::string& path) {
  if (path.empty()) return std::string();
  std::ifstream file(path);
  std::ostringstream contents;
  contents << file.rdbuf();
  if (!file.good()) return absl::InvalidArgumentError(absl::StrCat(path, " cannot be read"));
  return contents.str();
}

absl::StatusOr<TlsContents> ReadFiles(const TlsFiles& files) {
  auto certificate = ReadFile(files.certificate);
  if (!certificate.ok()) return certificate.status();
  auto private_key = ReadFile(files.private_key);
  if (!private_key.ok()) return private_key.status();
  auto client_ca = ReadFile(files.client_ca);
  if (!client_ca.ok()) return client_ca.status();
  return TlsContents{*certificate, *private_key, *client_ca};
}

}  // namespace

absl::StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(
    const TlsFiles& files) {
  if (files.certificate.empty()) return grpc::InsecureServerCredentials();
  const auto contents = ReadFiles(files);
  if (!contents.ok()) return contents.status();
  grpc::SslServerCredentialsOptions options(
      files.client_ca.empty() ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
                              : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = contents->client_ca;
  options.pem_key_cert_pairs.push_back({contents->private_key, contents->certificate});
  return grpc::SslServerCredentials(options);
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakePushCredentials(
    const TlsFiles& files) {
  if (files.certificate.empty()) return grpc::InsecureChannelCredentials();
  const auto contents = ReadFiles(files);
  if (!contents.ok()) return contents.status();
  grpc::SslCredentialsOptions options;
  options.pem_root_certs = contents->client_ca;
  options.pem_private_key = contents->private_key;
  options.pem_cert_chain = contents->certificate;
  return grpc::SslCredentials(options);
}

}  // namespace prefilld::server
