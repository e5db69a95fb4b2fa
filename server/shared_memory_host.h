// Serves the sockets at which consumers of this host get the memory of their requests
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
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "prefill/v1/shared_memory.pb.h"
#include "proto/wire/descriptor.h"
#include "proto/wire/packet_socket.h"
#include "server/shared_region.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

class PrefillJob;
class Scheduler;
class SharedMemoryMetrics;
class StagingRing;

// A socket file that was listened on before it had its name, so that whoever finds it is answered.
// Removed on destruction.
class SocketFile {
 public:
  // Makes a socket of a new name in the folder, and removes those there that nobody serves any
  // more. UNAVAILABLE: says why it cannot.
  static absl::StatusOr<std::unique_ptr<SocketFile>> Create(const std::string& folder);
  ~SocketFile();

  const std::string& path() const { return path_; }
  const wire::Descriptor& listener() const { return listener_; }

 private:
  SocketFile(std::string path, wire::Descriptor listener);

  const std::string path_;
  const wire::Descriptor listener_;
};

// Each consumer that connects has a thread, which waits for what it says. A consumer is known by
// the key of its request; of those that have not shown one yet, few may be there, and not for long.
// Thread-safe.
class SharedMemoryHost {
 public:
  struct Settings {
    int64_t max_bytes = 0;  // of all regions; at least 1
    std::string folder;     // for consumers outside this network namespace; empty: there are none
  };
  struct Surroundings {
    model::PrefillEngine& engine;
    StagingRing& ring;
    Scheduler& scheduler;
    SharedMemoryMetrics& metrics;
  };

  // UNAVAILABLE: there can be no socket in the folder.
  static absl::StatusOr<std::unique_ptr<SharedMemoryHost>> Create(const Settings& settings,
                                                                  const Surroundings& surroundings);
  // Lets all consumers go, and waits until their memory is gone, for `kLastMemory` at most.
  ~SharedMemoryHost();

  // The addresses of SharedMemoryOffer. Empty: this system has no memory that can be shared so.
  const std::vector<std::string>& sockets() const { return sockets_; }
  int64_t used_bytes() const { return use_->used; }

  static constexpr size_t kMaxUnknown = 64;  // connections that have shown no key
  static constexpr absl::Duration kHandshake = absl::Seconds(1);
  static constexpr absl::Duration kLastMemory = absl::Seconds(5);

 private:
  struct Visit {
    explicit Visit(wire::PacketSocket socket) : socket(std::move(socket)) {}

    wire::PacketSocket socket;
    std::atomic<bool> is_known = false;
    std::atomic<bool> is_over = false;
    std::thread thread;
  };
  struct Attachment {
    std::shared_ptr<PrefillJob> job;
    std::shared_ptr<SharedRegion> region;
  };

  SharedMemoryHost(const Settings& settings, const Surroundings& surroundings);

  absl::Status Listen(const std::string& folder);
  void AcceptAll();
  void Admit(wire::Descriptor connection);
  // Lets go of the visits that are over. Returns false when there is nothing left to wait for.
  bool ForgetPast();
  void Serve(Visit& visit);
  absl::StatusOr<Attachment> Attach(const ::prefill::v1::AttachSharedMemory& request);
  absl::Status TakeReceipts(Visit& visit, PrefillJob& job);
  void End(const Attachment& attachment, const absl::Status& reason);

  const Surroundings surroundings_;
  const std::shared_ptr<SharedMemoryUse> use_;  // co-owned by the regions
  std::unique_ptr<SocketFile> file_;
  wire::Descriptor abstract_;
  std::vector<std::string> sockets_;
  wire::Descriptor stop_event_;
  std::atomic<bool> stops_ = false;

  absl::Mutex mu_;
  std::list<Visit> visits_ ABSL_GUARDED_BY(mu_);
  std::thread accepting_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_HOST_H_
