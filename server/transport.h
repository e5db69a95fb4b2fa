// The stream below a lane, whatever it runs over.
#ifndef PREFILLD_SERVER_TRANSPORT_H_
#define PREFILLD_SERVER_TRANSPORT_H_

#include <cstddef>
#include <variant>

#include "absl/status/status.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/frame_header.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// The KV of a run of blocks: a header, and the payload in a staging buffer on loan.
struct KvFrame {
  wire::FrameHeader header;
  StagingRing::Lease payload;
  size_t payload_bytes = 0;
};

// A stream carries these. The event is never a frame.
using Message = std::variant<::prefill::v1::PrefillEvent, KvFrame>;

// One stream to a peer, driven by the LaneQueue that it is attached to: the transport encodes what
// it is given and sends it. It must call the queue's OnWriteDone once per Send, when the peer's
// side has taken the message and its staging buffer has been let go; and it must live until End is
// called, which is the queue's last word to it.
class Transport {
 public:
  virtual ~Transport() = default;
  // One message is under way at a time. `last`: nothing but End follows.
  virtual void Send(Message message, bool last) = 0;
  virtual void End(const absl::Status& status) = 0;  // OK: everything has been sent
  // Breaks off the message under way, whose OnWriteDone follows; the peer gets `status`. Called
  // under the queue's lock, so it must not call back.
  virtual void Cancel(const absl::Status& status) = 0;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_TRANSPORT_H_
