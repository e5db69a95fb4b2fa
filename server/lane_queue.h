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
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "prefill/v1/prefill.pb.h"
#include "server/clock.h"
#include "server/retained_frames.h"
#include "server/transport.h"

namespace prefilld::server {

// The progress of a request's compute, which its frames report.
struct ComputeProgress {
  absl::Time started_at = absl::InfinitePast();  // set before the first frame
  std::atomic<uint32_t> layers_computed = 0;
};

// Holds what is pushed until a transport is attached and ready for it.
//
// A queue that is resumable outlives its transports. It keeps the frames that were sent until they
// are acknowledged, and the result. When its transport breaks, another one may take its place,
// and until then its *consumer is away*. Its stream ends once every frame is acknowledged.
//
// Thread-safe.
class LaneQueue {
 public:
  // `progress` outlives the queue.
  LaneQueue(const Clock& clock, uint32_t lane, const ComputeProgress& progress,
            bool resumable = false)
      : clock_(clock),
        lane_(lane),
        progress_(progress),
        resumable_(resumable),
        keeps_frames_(resumable) {}

  // Attaches the first transport. Returns false when one was attached before.
  bool Attach(Transport* transport);
  bool attached() const;  // now or before

  // Has the queue keep frames until they are acknowledged, as a resumable one does, because their
  // consumer reads them where they are. Frames that were sent before need no acknowledgement.
  void KeepUntilAcknowledged();

  // Attaches a transport to a resumable queue in place of the one before, which is ended if it has
  // not ended. It sends `greeting`, then the frames from `received` on that were sent before, then
  // what is queued. Returns the number of the former. If it fails, the transport is not used:
  // - OUT_OF_RANGE: as RetainedFrames::CheckResumable.
  // - the status of Abort.
  //
  // Nullopt: the peer has still to say what it has received, and so the consumer counts as away.
  // GoOnFrom says it before the greeting is done.
  absl::StatusOr<int64_t> Resume(Transport* transport, std::optional<uint64_t> received,
                                 std::optional<Message> greeting);
  absl::StatusOr<int64_t> GoOnFrom(uint64_t received);
  // Tells whether Resume would fail now, and changes nothing.
  absl::Status CheckResumable(uint64_t received) const;
  // Makes the queue one that is not resumable and keeps no frames. It must have sent no frame.
  void ForgoResumption();
  // Releases the frames before `received`, and sends those of `damaged` that are left once more.
  // Returns how many that are. OUT_OF_RANGE: that many were not sent. ABORTED: a frame arrived
  // damaged too often, and the request had better end.
  absl::StatusOr<int64_t> Acknowledge(uint64_t received, absl::Span<const uint64_t> damaged);
  // For a transport whose peer is gone: it is ended. Returns false, and does nothing, if the queue
  // is not resumable or no transport was attached to it.
  bool OnPeerGone(const Transport* transport);

  // Queues a message; does nothing after Abort. A frame's lane, sequence, sent_at_us and
  // layers_computed are filled in when its turn comes, so that they tell the moment of sending.
  void Push(Message message);
  // Takes no more messages. The stream ends with OK after those queued and `last`, if there is one.
  void Close(std::optional<Message> last = std::nullopt);
  // Drops what is queued, breaks off the write in progress, ends with `status`.
  void Abort(const absl::Status& status);

  void OnWriteDone(bool ok);  // for the transport

  // Payloads of frames that are queued, being written, or not acknowledged by a consumer that can.
  size_t pending_bytes() const;
  bool idle() const;  // nothing queued or being written
  // State of a resumable queue.
  struct HeldFrames {  // that are queued or not acknowledged
    int64_t all = 0;
    int64_t staged = 0;  // in staging memory, and not in memory that the consumer reads
  };
  HeldFrames held_frames() const;
  bool all_acknowledged() const;  // every frame pushed so far
  bool has_transport() const;     // whose End is still to come
  absl::Duration AwayFor(
      absl::Time now) const;  // how long the consumer has been away; 0: it is not

  // Tells for how long the peer has taken nothing of the message that the transport was given, or
  // acknowledged nothing of what it has taken; 0 when it has nothing to do. A peer that came back
  // has to acknowledge something, however much its new stream takes: it could come back for ever.
  //
  // A large message may leave slowly without a stall, so every kProgressBytes that the connection
  // passes on count as progress. They may belong to other streams of the connection, though. So
  // they count only until as much has passed as the message and all that could have been ahead of
  // it; a message that has not left by then is held up while other streams are not.
  absl::Duration StalledFor(absl::Time now);
  static constexpr int64_t kProgressBytes = 64 << 10;

  struct Taken {
    size_t payload_bytes = 0;
    absl::Duration busy;  // time in which a message waited to be taken, or to be acknowledged
  };
  // Tells how much the transport has taken so far; if frames are kept, how much was acknowledged.
  Taken taken(absl::Time now) const;

 private:
  struct Next {  // what there is to do for a transport: a message to send, or its end
    Transport* transport = nullptr;
    std::optional<Message> message = std::nullopt;
    bool last = false;
    absl::Status end = absl::OkStatus();
  };

  void Pump();
  std::optional<Next> TakeNext() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::optional<Message> TakeMessage() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Transport* Detach() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SeatSuccessor() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::deque<KvFrame> GoOn(uint64_t received) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void CountAcknowledged(const std::deque<KvFrame>& released) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartClock() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteProgress(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Stamp(KvFrame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock& clock_;
  const uint32_t lane_;
  const ComputeProgress& progress_;

  mutable absl::Mutex mu_;
  bool resumable_ ABSL_GUARDED_BY(mu_);
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
  absl::Time passed_on_at_ ABSL_GUARDED_BY(mu_);     // by the connection, of this write or the last
  int64_t taken_at_start_ ABSL_GUARDED_BY(mu_) = 0;  // by the connection, when the write started
  int64_t taken_at_progress_ ABSL_GUARDED_BY(mu_) = 0;
  Taken taken_ ABSL_GUARDED_BY(mu_);  // by the writes that are done

  bool keeps_frames_ ABSL_GUARDED_BY(mu_);  // until they are acknowledged
  RetainedFrames retained_ ABSL_GUARDED_BY(mu_);
  absl::Time acknowledged_at_ ABSL_GUARDED_BY(mu_);  // latest, or the first of retained_ was sent
  Taken acknowledged_ ABSL_GUARDED_BY(mu_);

  // Resumable queues alone use these.
  struct Successor {
    Transport* transport;
    std::optional<Message> greeting;
  };
  // The consumer has come back, or has had its stream replaced, since it acknowledged a frame.
  bool was_excused_ ABSL_GUARDED_BY(mu_) = false;
  bool lost_ ABSL_GUARDED_BY(mu_) = false;  // transport_ ends as soon as it writes no more
  std::optional<Successor> successor_ ABSL_GUARDED_BY(mu_);  // takes its place then
  std::optional<Message> greeting_ ABSL_GUARDED_BY(mu_);     // goes before everything else
  std::optional<::prefill::v1::PrefillEvent> result_ ABSL_GUARDED_BY(mu_);  // once it was sent
  std::optional<absl::Time> away_since_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_LANE_QUEUE_H_
