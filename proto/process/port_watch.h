// Watches a server's port from outside, as one of its callers.
#ifndef PREFILLD_PROTO_PROCESS_PORT_WATCH_H_
#define PREFILLD_PROTO_PROCESS_PORT_WATCH_H_

#include <memory>
#include <string>
#include <thread>

#include "absl/synchronization/notification.h"
#include "absl/time/time.h"

namespace prometheus {
class Registry;
}

namespace prefilld::wire {
class Arrivals;
class Connections;
}  // namespace prefilld::wire

namespace prefilld::process {

class Health;

// Tells whether whoever listens at `address`, an IP address and port or unix:/path, answers a new
// connection within `timeout`. An end of the connection is an answer too. It works with TLS and
// without, because it sends nothing.
bool Answers(const std::string& address, absl::Duration timeout);

// Dials the server's own addresses again and again. A process that lets no new caller in is not
// live, however well the connections that it has are served. It also keeps prefilld_reachable and
// the metrics of connections and of requests on their way, and logs when some were refused or
// ended.
class PortWatch {
 public:
  struct Timing {
    absl::Duration interval = absl::Seconds(5);  // between two connections
    absl::Duration timeout = absl::Seconds(5);   // for an answer
    int failures = 3;                            // in a row, until the process is not live
  };

  // All of them must outlive it. `arrivals` may be null.
  PortWatch(const wire::Connections& connections, const wire::Arrivals* arrivals, Health& health,
            std::shared_ptr<prometheus::Registry> registry, const Timing& timing);
  ~PortWatch();

 private:
  struct Figures;

  void Run();
  void Dial();

  const wire::Connections& connections_;
  const wire::Arrivals* const arrivals_;
  Health& health_;
  const Timing timing_;
  const std::unique_ptr<Figures> figures_;
  int failures_ = 0;  // in a row; only the thread uses it

  absl::Notification stop_;
  std::thread thread_;
};

}  // namespace prefilld::process

#endif  // PREFILLD_PROTO_PROCESS_PORT_WATCH_H_
