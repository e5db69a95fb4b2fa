// The server without its command line: all parts put together over an engine.
#ifndef PREFILLD_SERVER_SERVER_H_
#define PREFILLD_SERVER_SERVER_H_

#include <memory>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "model/prefill/prefill_engine.h"
#include "server/clock.h"
#include "server/compute_thread.h"
#include "server/event_count.h"
#include "server/kv_packer.h"
#include "server/metrics.h"
#include "server/scheduler.h"
#include "server/server_options.h"
#include "server/staging_ring.h"

namespace prefilld::process {
class CertificateWatch;
class FileWatch;
class Health;
class MetricsEndpoint;
class PortWatch;
}  // namespace prefilld::process

namespace prefilld::wire {
class Arrivals;
class Listener;
}  // namespace prefilld::wire

namespace prefilld::server {

class CacheWatch;
class PrefillService;
class PushDialer;
class ResumptionService;
class SharedMemoryHost;
class TenantDirectory;
class Watchdog;

// Serves from Create to Drain. Thread-safe.
class PrefillServer {
 public:
  // `engine` and `clock` must outlive the server. `options.engine` is not read. Every error names
  // the flag.
  static absl::StatusOr<std::unique_ptr<PrefillServer>> Create(const ServerOptions& options,
                                                               model::PrefillEngine& engine,
                                                               const Clock& clock);
  // Ends requests that are still running with UNAVAILABLE.
  ~PrefillServer();

  int port() const;
  int metrics_port() const;  // 0: no metrics endpoint

  const Metrics& metrics() const { return *metrics_; }

  // Stops accepting work and waits until what was accepted is done. Returns false when the time ran
  // out. From the call on health says NOT_SERVING; connections stay open.
  bool Drain(absl::Duration timeout);

  // Waits until the page of metrics has been read once more, if it was read lately, so that the
  // last events before the end of the process are seen.
  void AwaitScrape(absl::Duration timeout);

  // Has the TLS files and the tenants read again; otherwise that happens when they change. Waits
  // for it, but at most for `patience`, and returns whether they were read.
  bool ReloadFiles(absl::Duration patience = absl::ZeroDuration());
  // Ends the watch over these files. Returns false, after `patience`, if one of them hangs: this
  // must not be destroyed then.
  bool StopWatchingFiles(absl::Duration patience);

  // Returns an error once the device has failed. The server accepts nothing then.
  absl::Status failure() const { return scheduler_->failure(); }

 private:
  PrefillServer(model::PrefillEngine& engine, const Clock& clock);

  absl::Status CreateStaging(const ServerOptions& options);
  void CreateScheduler(const ServerOptions& options);
  absl::Status CreateSharedMemory(const ServerOptions& options);
  absl::Status CreateService(const ServerOptions& options);
  absl::Status StartListening(const ServerOptions& options);
  absl::Status StartMetrics(const ServerOptions& options);
  void StartWatchdog(const ServerOptions& options);

  model::PrefillEngine& engine_;
  const Clock& clock_;
  JobTimeouts timeouts_;

  // Members stand in the order of construction and are destroyed in reverse.
  Progress progress_;
  EventCount wake_;  // of the compute thread
  std::unique_ptr<Metrics> metrics_;
  std::unique_ptr<StagingRing> ring_;
  std::unique_ptr<KvPacker> packer_;
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<ComputeThread> compute_thread_;
  std::unique_ptr<SharedMemoryHost> shared_memory_;  // null: there is none
  std::unique_ptr<PushDialer> push_dialer_;
  std::unique_ptr<wire::Arrivals> arrivals_;
  std::unique_ptr<CacheWatch> cache_watch_;
  std::unique_ptr<TenantDirectory> tenants_;
  std::unique_ptr<PrefillService> service_;
  std::unique_ptr<ResumptionService> resumption_service_;
  std::unique_ptr<wire::Listener> listener_;
  std::unique_ptr<process::Health> health_;
  std::unique_ptr<process::PortWatch> port_watch_;
  std::unique_ptr<Watchdog> watchdog_;
  std::unique_ptr<process::CertificateWatch> certificate_watch_;
  std::unique_ptr<process::FileWatch> file_watch_;
  std::unique_ptr<process::MetricsEndpoint> metrics_endpoint_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SERVER_H_
