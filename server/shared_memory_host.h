// Serves the sockets at which consumers of this host hand over the memory for their KV
// (prefill/v1/shared_memory.proto).
#ifndef PREFILLD_SERVER_SHARED_MEMORY_HOST_H_
#define PREFILLD_SERVER_SHARED_MEMORY_HOST_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <list>
#include <memory>
#include <string>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "proto/wire/descriptor.h"
#include "proto/wire/packet_socket.h"
#include "server/shared_memory_offer.h"
#include "server/shared_memory_use.h"
#include "server/shared_memory_visit.h"
#include "server/socket_file.h"

namespace prefilld::server {

// Each consumer that connects has a thread, which waits for what it says. Of those that have not
// shown a key yet, few may be there, and not for long; of the others as many as may be attached.
// Thread-safe.
class SharedMemoryHost {
 public:
  struct Settings {
    int64_t max_bytes = 0;              // of all memories; at least 1
    int64_t max_attachments = 0;        // memories, each of which has a thread; at least 1
    std::string folder;                 // for consumers outside this network namespace; empty: none
    int max_lanes = 1;                  // of a request
    bool is_shared_by_tenants = false;  // so that none takes all
  };
  struct Surroundings {
    model::PrefillEngine& engine;
    StagingRing& ring;
    Scheduler& scheduler;
    SharedMemoryMetrics& metrics;
  };

  // UNAVAILABLE: there can be no socket in the folder. What else this system lacks is logged, and
  // nothing is offered then.
  static absl::StatusOr<std::unique_ptr<SharedMemoryHost>> Create(const Settings& settings,
                                                                  const Surroundings& surroundings);
  // Lets all consumers go, and waits until their memory is gone, for `kLastMemory` at most.
  ~SharedMemoryHost();

  // Returns what requests may be offered.
  const SharedMemoryTerms& terms() const { return terms_; }

  static constexpr size_t kMaxUnknown = 64;  // connections that have shown no key
  static constexpr absl::Duration kLastMemory = absl::Seconds(5);

 private:
  struct Visit {
    Visit(wire::PacketSocket socket, const SharedMemorySurroundings& surroundings)
        : consumer(std::move(socket), surroundings) {}

    SharedMemoryVisit consumer;
    std::atomic<bool> is_over = false;
    std::thread thread;
  };

  SharedMemoryHost(const Settings& settings, const Surroundings& surroundings);

  absl::Status CheckSystem() const;
  absl::Status Listen(const std::string& folder);
  void AcceptAll();
  // Accepts one. Returns false when the system can give no more connections now.
  bool Accept(int listener);
  void Admit(wire::Descriptor connection);
  // Lets go of the visits that are over. Returns false when there is nothing left to wait for.
  bool ForgetPast();

  const SharedMemorySurroundings surroundings_;
  const size_t most_visits_;
  SharedMemoryTerms terms_;
  std::unique_ptr<SocketFile> file_;
  wire::Descriptor abstract_;
  wire::Descriptor stop_event_;
  std::atomic<bool> stops_ = false;

  absl::Mutex mu_;
  std::list<Visit> visits_ ABSL_GUARDED_BY(mu_);
  std::thread accepting_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_HOST_H_
