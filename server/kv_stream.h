// From finished layers to frames: packs a layer's KV into staging while the next one computes.
#ifndef PREFILLD_SERVER_KV_STREAM_H_
#define PREFILLD_SERVER_KV_STREAM_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "model/prefill_engine.h"
#include "server/prefill_job.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// Packing threads and the ring they fill. One request at a time:
//   Begin, (WaitForSlot, LayerDone)*, End
// by the compute thread. Between Begin and End it borrows the job and the sequence.
//
// Each thread takes the next frame, packs it, sums it up and hands it to a lane; a lane that is
// idle is written to right there, so that one thread alone would be the speed of all lanes.
//
// A request whose consumer is slow holds its credit of staging; then its finished layers keep their
// KV slots, and WaitForSlot pauses the compute.
class KvStream {
 public:
  // on_frame(lane, payload_bytes) is called by a packing thread for each frame handed over.
  KvStream(StagingRing& ring, int kv_slots, int num_threads,
           std::function<void(int, int64_t)> on_frame);
  ~KvStream();

  void Begin(PrefillJob& job, model::PrefillSequence& sequence);
  // Waits until the sequence may compute one more layer, or the job has ended. Not OK: the device
  // failed to pack.
  absl::Status WaitForSlot();
  void LayerDone(int layer);
  // Waits until every layer handed over has been packed or dropped. Not OK: as WaitForSlot.
  absl::Status End();

 private:
  // A finished layer until all of its frames are done with.
  struct Layer {
    int index;
    int64_t next_block;   // the first that no thread has taken
    int frames_underway;  // taken, not done
  };

  struct Frame {
    int layer;
    int64_t first_block;
    int64_t num_blocks;
  };

  void Run();
  Frame TakeFrame() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishFrame(const Frame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status PackFrame(PrefillJob& job, model::PrefillSequence& sequence, const Frame& frame);

  StagingRing& ring_;
  const int kv_slots_;
  const std::function<void(int, int64_t)> on_frame_;

  absl::Mutex mu_;
  PrefillJob* job_ ABSL_GUARDED_BY(mu_) = nullptr;
  model::PrefillSequence* sequence_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::deque<Layer> layers_ ABSL_GUARDED_BY(mu_);  // finished, not yet released; oldest first
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  std::atomic<bool> failed_ = false;  // not OK; what is left is dropped
  bool stop_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_KV_STREAM_H_
