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
#include "proto/wire/frame_codec.h"
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

  Delivery(int num_lanes, bool pushes, const Clock& clock);

  // To attach streams to. INVALID_ARGUMENT: no such side lane.
  LaneQueue& control() { return control_; }
  absl::StatusOr<LaneQueue*> side_lane(uint32_t lane);
  bool all_attached() const;
  // The stream of a side lane has ended well. (If not, the request is aborted.)
  void OnSideLaneDone();

  void Send(const ::prefill::v1::PrefillEvent& event);

  // The compute's progress, which frames report.
  void OnStart(absl::Time now) { started_at_ = now; }
  void OnLayerComputed() { layers_computed_.fetch_add(1, std::memory_order_relaxed); }
  // Hands a frame to the attached lane with the least to do. lane, sequence, sent_at_us and
  // layers_computed are filled in here. Returns the lane.
  int SendFrame(wire::FrameHeader header, StagingRing::Lease payload, size_t payload_bytes);

  // After the last frame. Adds kv_bytes, kv_frames and frames_per_lane.
  void SendResult(::prefill::v1::PrefillResult result);

  // Ends every stream with `status` and drops what they have not sent.
  void Abort(const absl::Status& status);

  // The longest time any stream has not taken the message it was given.
  absl::Duration StalledFor(absl::Time now) const;
  // KV that all lanes have taken, and the longest that one of them was busy with it.
  LaneQueue::Taken KvTaken(absl::Time now) const;
  Sent sent() const;

 private:
  int NextLane() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MaybeSendResult();

  const Clock& clock_;
  const bool pushes_;

  LaneQueue control_;
  std::vector<std::unique_ptr<LaneQueue>> side_lanes_;
  std::vector<LaneQueue*> kv_lanes_;

  // One per lane, touched only while its queue makes a message, one at a time and in their order:
  // several threads may hand frames to the same lane.
  std::vector<uint64_t> next_sequence_;

  // Set before the first frame.
  absl::Time started_at_;
  std::atomic<uint32_t> layers_computed_ = 0;

  mutable absl::Mutex mu_;
  Sent sent_ ABSL_GUARDED_BY(mu_);
  int last_lane_ ABSL_GUARDED_BY(mu_) = 0;
  int open_side_lanes_ ABSL_GUARDED_BY(mu_);
  std::optional<::prefill::v1::PrefillResult> result_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_DELIVERY_H_
