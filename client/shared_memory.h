// The memory in which a server on the same host puts the payloads of a call
// (prefill/v1/shared_memory.proto).
#ifndef PREFILLD_CLIENT_SHARED_MEMORY_H_
#define PREFILLD_CLIENT_SHARED_MEMORY_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_codec.h"
#include "proto/wire/packet_socket.h"

namespace prefilld::client {

// Thread-safe.
class SharedMemory {
 public:
  // Connects to the server that has accepted a request, and maps the request's memory. It takes
  // milliseconds. NOT_FOUND: the server offers none; UNAVAILABLE: its sockets are not reachable
  // from here; others: the server's reason, or what is wrong with the memory.
  static absl::StatusOr<std::unique_ptr<SharedMemory>> Attach(
      const ::prefill::v1::Accepted& accepted);
  // Unmaps the memory, which no payload may refer to any more.
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Tells the server that frames may lie there from now on.
  absl::Status Begin();
  // Returns the payload of a frame that lies there. It may be used until the frame is acknowledged.
  // DATA_LOSS: the frame is not inside the memory.
  absl::StatusOr<wire::FramePayload> PayloadOf(const wire::FrameHeader& frame) const;
  // Tells the server that every frame of the lane before `received` is stored. Returns false if it
  // does not hear it, as before Begin.
  bool Acknowledge(uint32_t lane, uint64_t received);

 private:
  SharedMemory(wire::PacketSocket socket, const uint8_t* data, size_t bytes)
      : socket_(std::move(socket)), data_(data), bytes_(bytes) {}

  wire::PacketSocket socket_;
  const uint8_t* const data_;
  const size_t bytes_;
  std::atomic<bool> is_heard_ = true;
  absl::Mutex begin_mu_;
  bool has_begun_ ABSL_GUARDED_BY(begin_mu_) = false;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_SHARED_MEMORY_H_
