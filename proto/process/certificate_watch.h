// Keeps a server's certificates up to date, and tells the operator about them and about those that
// the process shows to others.
#ifndef PREFILLD_PROTO_PROCESS_CERTIFICATE_WATCH_H_
#define PREFILLD_PROTO_PROCESS_CERTIFICATE_WATCH_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "proto/process/file_watch.h"
#include "proto/wire/server_certificates.h"
#include "proto/wire/tls.h"

namespace prometheus {
class Collectable;
}

namespace prefilld::process {

// Reads the files again when a FileWatch says so. Logs
//
//   certificates_reloaded        new connections show the new ones
//   certificates_refused         the new ones are not valid; calls to this server show the old
//                                ones, and calls that go out may get no connection
//   certificate_expires_soon     less than 14 days are left; once a day
//   certificate_expired          callers refuse it; once a day
class CertificateWatch {
 public:
  // `certificates` must outlive this; null: the server has no TLS. `client` are the files of calls
  // that go out; they are read again by those who call, and only watched here. Without any file
  // this does nothing.
  explicit CertificateWatch(wire::ServerCertificates* certificates,
                            std::optional<wire::ChannelTls> client = std::nullopt);
  ~CertificateWatch();

  // Returns what a FileWatch has to watch, which must not outlive this; nothing without TLS.
  std::vector<FileWatch::Subject> Subjects();

  // Returns prefilld_certificate_expiry_timestamp_seconds,
  // prefilld_client_certificate_expiry_timestamp_seconds,
  // prefilld_certificate_reloads_total{result} and prefilld_certificates_refused{certificate},
  // which may outlive this; none without TLS.
  std::shared_ptr<prometheus::Collectable> metrics() const;

 private:
  class Metrics;

  std::string ServerVersions() const;
  std::string ClientVersions() const;
  void ReloadServer(bool say_unchanged);
  void ReadClient();
  void WarnOfExpiry(absl::Time now);
  void WarnOfExpiry(const std::string& file, absl::Time expiry, absl::Time now);

  wire::ServerCertificates* const certificates_;
  std::optional<wire::ChannelTls> client_;  // constant after construction
  std::atomic<int64_t> client_expiry_ = 0;  // seconds since 1970
  const std::shared_ptr<Metrics> metrics_;
  std::string client_read_;  // versions of the client's files when they were last valid
  std::string read_;         // versions of the files, as they were read first
  absl::Time next_warning_ = absl::InfinitePast();  // of the watching thread
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_CERTIFICATE_WATCH_H_
