// The messages of one stream on their way to the transport: in order, one write at a time.
#ifndef PREFILLD_SERVER_LANE_QUEUE_H_
#define PREFILLD_SERVER_LANE_QUEUE_H_

#include <cstddef>
#include <deque>
#include <optional>

#include <grpcpp/support/byte_buffer.h>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"

namespace prefilld::server {

// Thread-safe. Holds what is pushed until a transport is attached and ready for it.
class LaneQueue {
 public:
  // A stream that the queue drives. After Attach it must call OnWriteDone once per Send and live
  // until End is called, which is the queue's last word to it.
  class Transport {
   public:
    virtual ~Transport() = default;
    // `message` is valid until OnWriteDone. `last`: nothing but End follows.
    virtual void Send(const grpc::ByteBuffer& message, bool last) = 0;
    virtual void End(const absl::Status& status) = 0;  // OK: everything has been sent
    // Breaks off the write in progress, whose OnWriteDone follows; the peer gets `status`.
    virtual void Cancel(const absl::Status& status) = 0;
  };

  // Makes the message when its turn has come, so that a header can tell the moment of sending.
  using MakeMessage = absl::AnyInvocable<grpc::ByteBuffer()>;

  explicit LaneQueue(const Clock& clock) : clock_(clock) {}

  // Once per queue: false when a transport was attached before.
  bool Attach(Transport* transport);
  bool attached() const;

  // `payload_bytes` is what pending_bytes() counts. Ignored after Abort.
  void Push(size_t payload_bytes, MakeMessage make);
  // No more messages follow: ends with OK after those queued, and `last` if there is one.
  void Close(MakeMessage last = nullptr);
  // Drops what is queued, breaks off the write in progress, ends with `status`.
  void Abort(const absl::Status& status);

  void OnWriteDone(bool ok);  // for the transport

  size_t pending_bytes() const;
  bool idle() const;  // nothing queued or being written
  // For how long the transport has not taken the message it was given; 0 when it has none.
  absl::Duration StalledFor(absl::Time now) const;

  struct Taken {
    size_t payload_bytes = 0;
    absl::Duration busy;  // how long there was a message to take
  };
  // What the transport has taken so far.
  Taken taken(absl::Time now) const;

 private:
  struct Pending {
    size_t payload_bytes;
    MakeMessage make;
  };

  void Pump();

  const Clock& clock_;
  mutable absl::Mutex mu_;
  Transport* transport_ ABSL_GUARDED_BY(mu_) = nullptr;  // null once End is due
  bool was_attached_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<Pending> queue_ ABSL_GUARDED_BY(mu_);
  size_t pending_bytes_ ABSL_GUARDED_BY(mu_) = 0;         // queued and in flight
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mu_);  // set: no more messages
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  size_t in_flight_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time write_started_ ABSL_GUARDED_BY(mu_);
  Taken taken_ ABSL_GUARDED_BY(mu_);  // by the writes that are done
  // Written under the lock when a write starts or is done; between the two it is the transport's.
  grpc::ByteBuffer in_flight_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_LANE_QUEUE_H_
