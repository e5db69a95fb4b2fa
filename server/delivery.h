// The streams of one request: events to the caller, KV frames to the consumer.
#ifndef PREFILLD_SERVER_DELIVERY_H_
#define PREFILLD_SERVER_DELIVERY_H_

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
#include "proto/wire/frame_header.h"
#include "server/clock.h"
#include "server/lane_queue.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// The *control* stream is the Prefill call. *KV lanes* carry frames: lane 0 is the control stream
// and the others are attached later (pull), or lane 0 is the call to the receiver (push). KV lanes
// other than the control stream are *side lanes*. The result goes out on the control stream when
// every frame has been handed over and every side lane has ended well.
//
// Thread-safe.
class Delivery {
 public:
  struct Sent {
    int64_t bytes = 0;  // payloads
    std::vector<int64_t> frames_per_lane;
  };
  // How the consumer is doing, over all streams.
  struct ConsumerState {
    bool all_attached = false;
    bool control_idle = false;  // the control stream has nothing to send
    // The longest time that any stream has not taken the message it was given.
    absl::Duration stalled;
    // KV that all lanes have taken, and the longest that one of them was busy with it.
    LaneQueue::Taken kv_taken;
  };

  Delivery(int num_lanes, bool pushes, const Clock& clock);

  // Streams are attached to these. INVALID_ARGUMENT: no such side lane.
  LaneQueue& control() { return *control_; }
  absl::StatusOr<LaneQueue*> side_lane(uint32_t lane);
  // The stream of a side lane has ended well. (If not, the request is aborted.)
  void OnSideLaneDone();

  // To be kept up to date by the request.
  ComputeProgress& progress() { return progress_; }

  void Send(::prefill::v1::PrefillEvent event);
  // Hands a frame to the attached lane with the least to do, and returns that lane. The header
  // needs layer, blocks and checksum; the lane fills in the rest.
  int SendFrame(KvFrame frame);
  // After the last frame. Adds kv_bytes, kv_frames and frames_per_lane.
  void SendResult(::prefill::v1::PrefillResult result);

  // Ends every stream with `status` and drops what they have not sent.
  void Abort(const absl::Status& status);

  ConsumerState consumer(absl::Time now) const;
  Sent sent() const;

 private:
  int NextLane() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MaybeSendResult();

  const bool pushes_;
  ComputeProgress progress_;

  std::unique_ptr<LaneQueue> control_;
  std::vector<std::unique_ptr<LaneQueue>> side_lanes_;
  std::vector<LaneQueue*> kv_lanes_;

  mutable absl::Mutex mu_;
  Sent sent_ ABSL_GUARDED_BY(mu_);
  int last_lane_ ABSL_GUARDED_BY(mu_) = 0;
  int open_side_lanes_ ABSL_GUARDED_BY(mu_);
  std::optional<::prefill::v1::PrefillResult> result_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_DELIVERY_H_
