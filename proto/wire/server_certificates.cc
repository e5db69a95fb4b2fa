#include "proto/wire/server_certificates.h"

#include <grpc/grpc.h>
#include <grpc/grpc_security.h>
#include <grpcpp/security/server_credentials.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/certificates.h"

namespace prefilld::wire {

struct ServerCertificates::Content {
  std::string chain;
  std::string key;
  std::string client_ca;
  absl::Time expiry;

  bool operator==(const Content& o) const {
    return chain == o.chain && key == o.key && client_ca == o.client_ca;
  }
};

// An address of a server and what its new connections are shown.
struct ServerCertificates::Viewer {
  ServerCertificates* certificates;
  std::shared_ptr<const Content> shown;  // guarded by the lock of `certificates`
};

namespace {

// gRPC asks these credentials for the certificates at each new connection. The classes of gRPC's
// C++ interface that reload certificates refuse all connections while the files do not match, for
// example between the writing of one and of the other; its C interface has no such gap.
class ReloadingCredentials final : public grpc::ServerCredentials {
 public:
  // Takes over the reference.
  explicit ReloadingCredentials(grpc_server_credentials* credentials) : credentials_(credentials) {}
  ~ReloadingCredentials() override { grpc_server_credentials_release(credentials_); }

  void SetAuthMetadataProcessor(const std::shared_ptr<grpc::AuthMetadataProcessor>&) override {}

 private:
  int AddPortToServer(const std::string& address, grpc_server* server) override {
    return grpc_server_add_http2_port(server, address.c_str(), credentials_);
  }

  grpc_server_credentials* const credentials_;
};

}  // namespace

ServerCertificates::ServerCertificates(const ServerTls& files)
    : files_(files), loaded_versions_(FileVersions()) {}
ServerCertificates::~ServerCertificates() = default;

absl::StatusOr<std::unique_ptr<ServerCertificates>> ServerCertificates::Load(
    const ServerTls& files) {
  std::unique_ptr<ServerCertificates> certificates(new ServerCertificates(files));
  PREFILLD_RETURN_IF_ERROR(certificates->Reload().status());
  return certificates;
}

std::shared_ptr<grpc::ServerCredentials> ServerCertificates::Credentials() {
  const auto fetch = +[](void* viewer, grpc_ssl_server_certificate_config** config) {
    auto& asking = *static_cast<Viewer*>(viewer);
    *config = nullptr;
    asking.certificates->Show(asking, config);
    return *config == nullptr ? GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_UNCHANGED
                              : GRPC_SSL_CERTIFICATE_CONFIG_RELOAD_NEW;
  };
  absl::MutexLock lock(&mu_);
  viewers_.push_back(std::make_unique<Viewer>(Viewer{.certificates = this, .shown = nullptr}));
  return std::make_shared<ReloadingCredentials>(grpc_ssl_server_credentials_create_with_options(
      grpc_ssl_server_credentials_create_options_using_config_fetcher(
          files_.client_ca_file.empty()
              ? GRPC_SSL_DONT_REQUEST_CLIENT_CERTIFICATE
              : GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY,
          fetch, viewers_.back().get())));
}

// Makes a configuration for gRPC unless the viewer has the content already.
void ServerCertificates::Show(Viewer& viewer, grpc_ssl_server_certificate_config** config) {
  absl::MutexLock lock(&mu_);
  if (viewer.shown == content_) return;
  const grpc_ssl_pem_key_cert_pair pair = {.private_key = content_->key.c_str(),
                                           .cert_chain = content_->chain.c_str()};
  // gRPC aborts without any authority, though it asks clients for nothing then, and so reads none.
  const std::string& authorities =
      content_->client_ca.empty() ? content_->chain : content_->client_ca;
  *config = grpc_ssl_server_certificate_config_create(authorities.c_str(), &pair, 1);
  viewer.shown = content_;
}

absl::StatusOr<bool> ServerCertificates::Reload() {
  auto content = std::make_shared<Content>();
  PREFILLD_ASSIGN_OR_RETURN(content->chain, ReadPemFile("--tls_cert", files_.cert_file));
  PREFILLD_ASSIGN_OR_RETURN(content->key, ReadPemFile("--tls_key", files_.key_file));
  PREFILLD_ASSIGN_OR_RETURN(content->client_ca,
                            ReadPemFile("--tls_client_ca", files_.client_ca_file));
  const absl::Time now = absl::Now();
  PREFILLD_ASSIGN_OR_RETURN(
      content->expiry,
      CheckKeyPair({.name = absl::StrCat("--tls_cert=", files_.cert_file), .text = content->chain},
                   {.name = absl::StrCat("--tls_key=", files_.key_file), .text = content->key},
                   now));
  if (!files_.client_ca_file.empty()) {
    PREFILLD_RETURN_IF_ERROR(
        CheckAuthorities({.name = absl::StrCat("--tls_client_ca=", files_.client_ca_file),
                          .text = content->client_ca},
                         now));
  }
  absl::MutexLock lock(&mu_);
  if (content_ != nullptr && *content_ == *content) return false;
  content_ = std::move(content);
  return true;
}

std::string ServerCertificates::FileVersions() const {
  return wire::FileVersions({files_.cert_file, files_.key_file, files_.client_ca_file});
}

absl::Time ServerCertificates::expiry() const {
  absl::MutexLock lock(&mu_);
  return content_->expiry;
}

}  // namespace prefilld::wire
