// One consumer's connection to a socket of shared memory (prefill/v1/shared_memory.proto).
#ifndef PREFILLD_SERVER_SHARED_MEMORY_VISIT_H_
#define PREFILLD_SERVER_SHARED_MEMORY_VISIT_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "prefill/v1/shared_memory.pb.h"
#include "proto/wire/descriptor.h"
#include "proto/wire/packet_socket.h"
#include "server/shared_memory_use.h"

namespace prefilld::model {
class PrefillEngine;
}

namespace prefilld::server {

class PrefillJob;
class Scheduler;
class SharedMemoryMetrics;
class SharedRegion;
class StagingRing;

// The parts of the server that all visits use. They are borrowed, but for `use`, which the regions
// co-own.
struct SharedMemorySurroundings {
  model::PrefillEngine& engine;
  StagingRing& ring;
  Scheduler& scheduler;
  SharedMemoryMetrics& metrics;
  std::shared_ptr<SharedMemoryUse> use;
  size_t buffer_bytes = 0;
  int64_t most_bytes = 0;  // of one memory
};

// A consumer is known by the key of its request. It brings one memory, with its first request, and
// keeps it mapped for those that follow. It is over when the consumer closes the connection, keeps
// silent for too long, or does not keep the rules.
class SharedMemoryVisit {
 public:
  // The surroundings are borrowed.
  SharedMemoryVisit(wire::PacketSocket socket, const SharedMemorySurroundings& surroundings)
      : surroundings_(surroundings), socket_(std::move(socket)) {}

  // Serves the consumer, to the end of the connection.
  void Run();
  // Has Run return soon. Thread-safe.
  void Stop();
  bool is_known() const { return is_known_; }  // thread-safe

  static constexpr absl::Duration kHandshake = absl::Seconds(1);
  // A consumer keeps its memory here for so long without a request. Clients let go before that.
  static constexpr absl::Duration kIdle = absl::Seconds(20);

 private:
  // Why a consumer says nothing more of its request: OK when the request is over or the consumer
  // has gone on to the next, CANCELLED when it has closed the connection, INVALID_ARGUMENT when it
  // says what makes no sense.
  using Reason = absl::Status;
  using Attach = ::prefill::v1::AttachSharedMemory;

  std::optional<Attach> NextAttach();
  bool ServeRequest(const Attach& attach);
  absl::StatusOr<std::shared_ptr<PrefillJob>> Admit(const Attach& attach);
  absl::Status BringMemory(const Attach& attach, int tenant);
  absl::Status ReuseMemory(int tenant);
  bool Answer(const Attach& attach, const absl::Status& status);
  Reason TakeMessages(PrefillJob& job);
  Reason TakeReceipt(const ::prefill::v1::SharedMemoryReceipt& message, PrefillJob& job);
  void End(PrefillJob& job, const Reason& reason);

  const SharedMemorySurroundings& surroundings_;
  wire::PacketSocket socket_;
  std::atomic<bool> is_known_ = false;
  std::atomic<bool> stops_ = false;

  // The rest belongs to Run's thread.
  std::shared_ptr<SharedRegion> region_;   // null: no memory was brought yet
  std::vector<wire::Descriptor> brought_;  // with the latest `attach`
  std::optional<Attach> next_;             // came while the request before was served
  std::shared_ptr<PrefillJob> refused_;    // of the latest `attach`, if it showed its key
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_SHARED_MEMORY_VISIT_H_
