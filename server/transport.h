// The interface of the stream below a lane.
#ifndef PREFILLD_SERVER_TRANSPORT_H_
#define PREFILLD_SERVER_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <variant>

#include "absl/status/status.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_header.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// The KV of a run of blocks: a header, and the payload in a staging buffer on loan. Copies of a
// frame share the buffer, which goes back with the last of them.
struct KvFrame {
  wire::FrameHeader header;
  std::shared_ptr<const StagingRing::Lease> payload;
  size_t payload_bytes = 0;
};

// Tells whether a frame's payload is in staging memory, and not in memory that its consumer reads.
inline bool IsStaged(const KvFrame& frame) {
  return frame.payload == nullptr || frame.payload->region() == nullptr;
}

// A stream carries these messages. The event never holds a frame.
using Message = std::variant<::prefill::v1::PrefillEvent, KvFrame>;

// One stream to a peer, driven by the LaneQueue that it is attached to. It encodes the messages
// that it is given and sends them. It must call the queue's OnWriteDone once per Send, when the
// message has been taken and its share of the staging buffer released. It must live until End,
// which is the queue's last call.
class Transport {
 public:
  virtual ~Transport() = default;
  // Sends a message; one at a time is under way. If `last` is set, only End follows.
  virtual void Send(Message message, bool last) = 0;
  virtual void End(const absl::Status& status) = 0;  // OK: everything has been sent
  // Breaks off the message under way, whose OnWriteDone still follows. The peer gets `status`. It
  // is called under the queue's lock, so it must not call back.
  virtual void Cancel(const absl::Status& status) = 0;

  // The use of the connection below, which may carry other streams too.
  struct ConnectionUse {
    int64_t bytes_taken = 0;   // by the peer's machine, since it was opened
    int64_t most_streams = 1;  // that may share it
  };
  // Nullopt: unknown.
  virtual std::optional<ConnectionUse> connection_use() const { return std::nullopt; }
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TRANSPORT_H_
