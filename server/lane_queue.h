// The messages of one stream on their way to its transport, in order and one write at a time.
#ifndef PREFILLD_SERVER_LANE_QUEUE_H_
#define PREFILLD_SERVER_LANE_QUEUE_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <optional>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/clock.h"
#include "server/transport.h"

namespace prefilld::server {

// The progress of a request's compute, which its frames report.
struct ComputeProgress {
  absl::Time started_at = absl::InfinitePast();  // set before the first frame
  std::atomic<uint32_t> layers_computed = 0;
};

// Holds what is pushed until a transport is attached and ready for it. Thread-safe.
class LaneQueue {
 public:
  // `progress` outlives the queue.
  LaneQueue(const Clock& clock, uint32_t lane, const ComputeProgress& progress)
      : clock_(clock), lane_(lane), progress_(progress) {}

  // Attaches the transport. Returns false when one was attached before; a queue takes one only.
  bool Attach(Transport* transport);
  bool attached() const;

  // Queues a message; does nothing after Abort. A frame's lane, sequence, sent_at_us and
  // layers_computed are filled in when its turn comes, so that they tell the moment of sending.
  void Push(Message message);
  // Takes no more messages. The stream ends with OK after those queued and `last`, if there is one.
  void Close(std::optional<Message> last = std::nullopt);
  // Drops what is queued, breaks off the write in progress, ends with `status`.
  void Abort(const absl::Status& status);

  void OnWriteDone(bool ok);  // for the transport

  size_t pending_bytes() const;  // payloads of frames, queued or being written
  bool idle() const;             // nothing queued or being written
  // Tells for how long the peer has taken nothing of the message that the transport was given; 0
  // when it has none.
  //
  // A large message may leave slowly without a stall, so every kProgressBytes that the connection
  // passes on count as progress. They may belong to other streams of the connection, though. So
  // they count only until as much has passed as the message and all that could have been ahead of
  // it; a message that has not left by then is held up while other streams are not.
  absl::Duration StalledFor(absl::Time now);
  static constexpr int64_t kProgressBytes = 64 << 10;

  struct Taken {
    size_t payload_bytes = 0;
    absl::Duration busy;  // time in which a message waited to be taken
  };
  // Tells how much the transport has taken so far.
  Taken taken(absl::Time now) const;

 private:
  void Pump();
  void StartClock() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteProgress(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Stamp(KvFrame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock& clock_;
  const uint32_t lane_;
  const ComputeProgress& progress_;

  mutable absl::Mutex mu_;
  Transport* transport_ ABSL_GUARDED_BY(mu_) = nullptr;  // null once End is due
  bool was_attached_ ABSL_GUARDED_BY(mu_) = false;
  std::deque<Message> queue_ ABSL_GUARDED_BY(mu_);
  uint64_t next_sequence_ ABSL_GUARDED_BY(mu_) = 0;       // of frames
  size_t pending_bytes_ ABSL_GUARDED_BY(mu_) = 0;         // queued and in flight
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mu_);  // set: no more messages
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  size_t in_flight_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time write_started_ ABSL_GUARDED_BY(mu_);
  absl::Time last_progress_ ABSL_GUARDED_BY(mu_);    // of the write
  int64_t taken_at_start_ ABSL_GUARDED_BY(mu_) = 0;  // by the connection, when the write started
  int64_t taken_at_progress_ ABSL_GUARDED_BY(mu_) = 0;
  Taken taken_ ABSL_GUARDED_BY(mu_);  // by the writes that are done
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_LANE_QUEUE_H_
