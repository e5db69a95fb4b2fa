// The streams of one request: events to the caller, KV frames to the consumer.
#ifndef PREFILLD_SERVER_DELIVERY_H_
#define PREFILLD_SERVER_DELIVERY_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "prefill/v1/prefill.pb.h"
#include "prefill/v1/receiver.pb.h"
#include "prefill/v1/resumption.pb.h"
#include "proto/wire/frame_header.h"
#include "server/clock.h"
#include "server/lane_queue.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// The *control* stream is the Prefill call. *KV lanes* carry frames: lane 0 is the control stream
// and the others are attached later (pull), or all are calls to the receiver (push). KV lanes other
// than the control stream are *side lanes*. The result goes out on the control stream when every
// frame has been handed over and every side lane has ended well.
//
// A delivery may be resumable. Then its queues are (LaneQueue), and the result waits until every
// frame is acknowledged. The lanes of a push are so in any case, whatever the control stream is.
// Lane 0 of a push carries the result once all frames are acknowledged, and with that the push has
// ended.
//
// Thread-safe.
class Delivery {
 public:
  struct Sent {
    int64_t bytes = 0;         // payloads
    int64_t shared_bytes = 0;  // of them, those that lie in memory that the consumer reads
    std::vector<int64_t> frames_per_lane;
  };
  // The state of the consumer, over all streams.
  struct ConsumerState {
    bool all_attached = false;
    bool control_idle = false;  // the control stream has nothing to send
    // The longest time that any stream has been unable to pass on the message it was given.
    absl::Duration stalled;
    // The KV that all lanes have taken, and the longest time that one of them was busy with it.
    LaneQueue::Taken kv_taken;
    // The longest time that the consumer has been away from a stream, which it may resume, and that
    // the receiver of a push has been away from a lane.
    absl::Duration away;
    absl::Duration receiver_away;
    // Frames that wait to be sent, or are not acknowledged by a consumer that can.
    LaneQueue::HeldFrames held_frames;
  };

  Delivery(int num_lanes, bool pushes, const Clock& clock, bool resumable = false);

  // The queues that streams are attached to. side_lane fails with INVALID_ARGUMENT when the request
  // has no such lane, and so does any_lane, which has those of the caller: the control stream and
  // the lanes of a pull.
  LaneQueue& control() { return *control_; }
  absl::StatusOr<LaneQueue*> side_lane(uint32_t lane);
  absl::StatusOr<LaneQueue*> any_lane(uint32_t lane);
  // Has every lane keep its frames until they are acknowledged (LaneQueue::KeepUntilAcknowledged).
  void KeepUntilAcknowledged();
  // Records that the stream of a side lane has ended well. If a stream fails and the lane cannot be
  // resumed, the request is aborted instead.
  void OnSideLaneDone(uint32_t lane);
  // Takes what a consumer says of a lane (LaneQueue::Acknowledge). INVALID_ARGUMENT: there is no
  // such lane.
  absl::StatusOr<int64_t> Acknowledge(const ::prefill::v1::LaneReceipt& receipt);
  // The same, of the receiver of a push. `goes_on`: of a new stream (LaneQueue::GoOnFrom).
  absl::StatusOr<int64_t> AcknowledgePush(uint32_t lane,
                                          const ::prefill::v1::ReceiveReceipt& receipt,
                                          bool goes_on);
  // Tells whether the result has been handed to lane 0 of a push.
  bool result_was_pushed() const;
  // The receiver of a push, to which nothing was sent, acknowledges nothing: lane 0 carries
  // everything, and ends with its stream.
  void FallBackToPlainPush();

  // The progress that frames report; the request keeps it up to date.
  ComputeProgress& progress() { return progress_; }
  const ComputeProgress& progress() const { return progress_; }

  void Send(::prefill::v1::PrefillEvent event);
  // Hands a frame to the attached lane with the least to do, and returns that lane. The header
  // needs layer, blocks and checksum; the lane fills in the rest.
  int SendFrame(KvFrame frame);
  // Sends the result once the last frame has been handed over. Adds kv_bytes, kv_frames and
  // frames_per_lane to it.
  void SendResult(::prefill::v1::PrefillResult result);

  // Tells whether payloads of so many bytes were sent in all, and the consumer has every frame that
  // it acknowledges.
  bool HasDelivered(int64_t bytes) const;

  // Tells whether the result has been handed to the control stream.
  bool result_is_out() const { return result_is_out_.load(std::memory_order_acquire); }

  // Ends every stream with `status` and drops what they have not sent.
  void Abort(const absl::Status& status);

  ConsumerState consumer(absl::Time now);
  Sent sent() const;

 private:
  int NextLane() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MaybeSendResult();
  void MaybePushResult();

  const bool pushes_;
  const bool resumable_;  // the control stream
  ComputeProgress progress_;

  std::unique_ptr<LaneQueue> control_;
  std::vector<std::unique_ptr<LaneQueue>> side_lanes_;
  std::vector<LaneQueue*> kv_lanes_;

  std::atomic<bool> result_is_out_ = false;

  mutable absl::Mutex mu_;
  Sent sent_ ABSL_GUARDED_BY(mu_);
  int last_lane_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<uint32_t> open_side_lanes_ ABSL_GUARDED_BY(mu_);
  std::optional<::prefill::v1::PrefillResult> result_ ABSL_GUARDED_BY(mu_);
  bool acknowledges_push_ ABSL_GUARDED_BY(mu_) = true;  // the receiver
  bool pushed_result_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_DELIVERY_H_
