// Keeps a server's certificates up to date, and tells the operator about them and about those that
// the process shows to others.
#ifndef PREFILLD_PROTO_PROCESS_CERTIFICATE_WATCH_H_
#define PREFILLD_PROTO_PROCESS_CERTIFICATE_WATCH_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "absl/time/time.h"
#include "proto/wire/server_certificates.h"
#include "proto/wire/tls.h"

namespace prometheus {
class Collectable;
}

namespace prefilld::process {

// Looks at the files every second and reads them again once they have changed and come to rest.
// Logs
//
//   certificates_reloaded        new connections are shown the new ones
//   certificates_refused         the new ones are not valid; the old ones are shown on
//   certificate_expires_soon     less than 14 days are left; once a day
//   certificate_expired          callers refuse it; once a day
//
// Thread-safe.
class CertificateWatch {
 public:
  // `certificates` must outlive this; null: the server has no TLS. `client` are the files of calls
  // that go out; they are read again by those who call, and only watched here. Without any file
  // this does nothing.
  explicit CertificateWatch(wire::ServerCertificates* certificates,
                            std::optional<wire::ChannelTls> client = std::nullopt);
  ~CertificateWatch();

  // Reads the files now, on an operator's word (SIGHUP), and logs the result whatever it is.
  void ReloadNow();

  // Returns prefilld_certificate_expiry_timestamp_seconds,
  // prefilld_client_certificate_expiry_timestamp_seconds and
  // prefilld_certificate_reloads_total{result}, which may outlive this; none without TLS.
  std::shared_ptr<prometheus::Collectable> metrics() const;

 private:
  class Metrics;

  void Run();
  std::string ServerVersions() const;
  std::string ClientVersions() const;
  void Reload(bool say_unchanged);
  void ReloadServer(bool say_unchanged);
  void ReadClient();
  void WarnOfExpiry(absl::Time now);
  void WarnOfExpiry(const std::string& file, absl::Time expiry, absl::Time now);

  wire::ServerCertificates* const certificates_;
  std::optional<wire::ChannelTls> client_;  // constant after construction
  std::atomic<int64_t> client_expiry_ = 0;  // seconds since 1970
  const std::shared_ptr<Metrics> metrics_;
  std::string read_;                                // versions of the files; of the thread
  absl::Mutex reload_mu_;                           // one reload at a time
  absl::Time next_warning_ = absl::InfinitePast();  // of the thread
  absl::Notification stop_;
  std::optional<std::thread> thread_;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_CERTIFICATE_WATCH_H_
