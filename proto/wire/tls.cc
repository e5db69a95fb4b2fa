#include "proto/wire/tls.h"

#include <sys/stat.h>

#include <fstream>
#include <iterator>
#include <utility>

#include <grpcpp/security/credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/certificates.h"

namespace prefilld::wire {
namespace {

// How often a channel looks at its files.
constexpr unsigned kRefreshSeconds = 2;

// Reads a certificate and its key. Both may be renewed between the two reads, and then they are
// read again.
absl::Status ReadPair(const ChannelTls& tls, PemText& chain, PemText& key) {
  constexpr int kAttempts = 3;
  for (int attempt = 1; attempt <= kAttempts; ++attempt) {
    const std::string before = FileVersions({tls.cert_file, tls.key_file});
    PREFILLD_ASSIGN_OR_RETURN(chain.text, ReadPemFile("TLS cert_file", tls.cert_file));
    PREFILLD_ASSIGN_OR_RETURN(key.text, ReadPemFile("TLS key_file", tls.key_file));
    if (FileVersions({tls.cert_file, tls.key_file}) == before) break;
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<absl::Time> ChannelCertificateExpiry(const ChannelTls& tls) {
  if (tls.cert_file.empty() != tls.key_file.empty()) {
    return absl::InvalidArgumentError("TLS cert_file and key_file go together; only one is set");
  }
  const absl::Time now = absl::Now();
  if (!tls.ca_file.empty()) {
    PemText ca = {.name = absl::StrCat("TLS ca_file ", tls.ca_file), .text = ""};
    PREFILLD_ASSIGN_OR_RETURN(ca.text, ReadPemFile("TLS ca_file", tls.ca_file));
    PREFILLD_RETURN_IF_ERROR(CheckAuthorities(ca, now));
  }
  if (tls.cert_file.empty()) return absl::InfiniteFuture();
  PemText chain = {.name = absl::StrCat("TLS cert_file ", tls.cert_file), .text = ""};
  PemText key = {.name = absl::StrCat("TLS key_file ", tls.key_file), .text = ""};
  PREFILLD_RETURN_IF_ERROR(ReadPair(tls, chain, key));
  return CheckKeyPair(chain, key, now);
}

std::string FileVersions(const std::vector<std::string>& paths) {
  std::string versions;
  for (const std::string& path : paths) {
    struct stat facts = {};
    if (path.empty() || stat(path.c_str(), &facts) != 0) {
      versions += "none;";
      continue;
    }
    absl::StrAppend(&versions, facts.st_dev, ":", facts.st_ino, ":", facts.st_size, ":",
                    facts.st_mtim.tv_sec, ".", facts.st_mtim.tv_nsec, ":", facts.st_ctim.tv_sec,
                    ".", facts.st_ctim.tv_nsec, ";");  // the latter tells of new rights too
  }
  return versions;
}

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
  const absl::Time now = absl::Now();
  const auto read = [&problems](const char* flag, const std::string& path) {
    PemText pem = {.name = absl::StrCat(flag, "=", path), .text = ""};
    if (auto text = ReadPemFile(flag, path); text.ok()) {
      pem.text = *std::move(text);
    } else {
      problems.push_back(absl::StrCat(pem.name, " cannot be read"));
    }
    return pem;
  };
  const auto add = [&problems](const absl::Status& status) {
    if (!status.ok()) problems.emplace_back(status.message());
  };
  const PemText chain = read("--tls_cert", tls.cert_file);
  const PemText key = read("--tls_key", tls.key_file);
  const PemText client_ca = read("--tls_client_ca", tls.client_ca_file);
  if (!chain.text.empty() && !key.text.empty()) add(CheckKeyPair(chain, key, now).status());
  if (!client_ca.text.empty()) add(CheckAuthorities(client_ca, now));
}

absl::StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(
    const std::optional<ChannelTls>& tls) {
  if (!tls.has_value()) return grpc::InsecureChannelCredentials();
  PREFILLD_RETURN_IF_ERROR(ChannelCertificateExpiry(*tls).status());
  grpc::experimental::TlsChannelCredentialsOptions options;
  if (!tls->ca_file.empty() || !tls->cert_file.empty()) {
    options.set_certificate_provider(
        std::make_shared<grpc::experimental::FileWatcherCertificateProvider>(
            tls->key_file, tls->cert_file, tls->ca_file, kRefreshSeconds));
  }
  if (!tls->ca_file.empty()) options.watch_root_certs();
  if (!tls->cert_file.empty()) options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

}  // namespace prefilld::wire
