// The memory in which a server on the same host puts the payloads of calls
// (prefill/v1/shared_memory.proto).
#ifndef PREFILLD_CLIENT_SHARED_MEMORY_H_
#define PREFILLD_CLIENT_SHARED_MEMORY_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "client/memory_budget.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/descriptor.h"
#include "proto/wire/frame_codec.h"
#include "proto/wire/packet_socket.h"
#include "proto/wire/sealed_memory.h"

namespace prefilld::client {

// A memory of this process, attached to a server for one call after the other. Thread-safe, but for
// AttachAgain.
class SharedMemory {
 public:
  // All memories of this process together, whatever its servers say: those of a dozen calls with
  // four lanes. One call can use 272 MiB at most, with 16 lanes and frames of 4 MiB.
  static constexpr size_t kMostBytes = size_t{512} << 20;

  // Makes a memory of the size that the server can use and hands it over. It takes milliseconds.
  // NOT_FOUND: the server offers none; UNAVAILABLE: its sockets are not reachable from here, or are
  // none that a server of this host has; RESOURCE_EXHAUSTED: there is no memory, or this
  // process has as much attached as it may (kMostBytes); others: the server's reason.
  static absl::StatusOr<std::unique_ptr<SharedMemory>> Attach(
      const ::prefill::v1::Accepted& accepted);
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Attaches the same memory to another call. Everything of the one before must have come.
  // UNAVAILABLE: the server has let go of it; others: the server's reason. After an error it is of
  // no use any more.
  absl::Status AttachAgain(const ::prefill::v1::Accepted& accepted);
  // Tells whether the server hears it, as far as is known here.
  bool is_heard() const { return is_heard_.load(std::memory_order_relaxed); }
  // Tells whether it can serve the call as well as a new one.
  bool Suits(const ::prefill::v1::SharedMemoryOffer& offer) const;

  // Tells the server that frames may lie there from now on. Must be said once more when a stream
  // was resumed.
  absl::Status Begin();
  // Returns the payload of a frame that lies there. It may be used until the frame is acknowledged.
  // DATA_LOSS: the frame is not inside the memory.
  absl::StatusOr<wire::FramePayload> PayloadOf(const wire::FrameHeader& frame) const;
  // Tells the server that every frame of the lane before `received` is stored. Returns false if it
  // does not hear it, as before Begin.
  bool Acknowledge(uint32_t lane, uint64_t received);

 private:
  SharedMemory(std::string address, wire::PacketSocket socket, MemoryBudget::Share share,
               wire::Mapping mapping)
      : address_(std::move(address)),
        socket_(std::move(socket)),
        share_(std::move(share)),
        mapping_(std::move(mapping)) {}

  // `memory` goes with the message, unless it is null.
  absl::Status Introduce(const ::prefill::v1::Accepted& accepted, const wire::Descriptor* memory);

  const std::string address_;  // of the server's socket
  wire::PacketSocket socket_;
  const MemoryBudget::Share share_;  // of what this process may make
  const wire::Mapping mapping_;
  std::atomic<bool> is_heard_ = true;
  absl::Mutex begin_mu_;
  bool has_begun_ ABSL_GUARDED_BY(begin_mu_) = false;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_SHARED_MEMORY_H_
