// From finished layers to frames: packs a layer's KV into staging while the next one computes.
#ifndef PREFILLD_SERVER_KV_STREAM_H_
#define PREFILLD_SERVER_KV_STREAM_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"
#include "server/prefill_job.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// Packing threads and the ring they fill. One sequence at a time:
//   Begin, (WaitForSlot, LayerDone)*, End
// by the compute thread. Between Begin and End it borrows the sequence.
//
// Each thread takes the next frame, packs it, sums it up and hands it to a lane; a lane that is
// idle is written to right there, so that one thread alone would be the speed of all lanes. The
// prompts of a batch take turns, frame by frame, the oldest layer first.
//
// A request whose consumer is slow holds its credit of staging; the others of its batch are packed
// meanwhile. Then finished layers keep their KV slots, and WaitForSlot pauses the compute.
class KvStream {
 public:
  // on_frame(lane, payload_bytes) is called by a packing thread for each frame handed over.
  KvStream(StagingRing& ring, int kv_slots, int num_threads,
           std::function<void(int, int64_t)> on_frame);
  ~KvStream();

  // Prompt i of the sequence is that of jobs[i].
  void Begin(absl::Span<const std::shared_ptr<PrefillJob>> jobs, model::PrefillSequence& sequence);
  // Waits until the sequence may compute one more layer, or all jobs have ended. Not OK: the device
  // failed to pack.
  absl::Status WaitForSlot();
  void LayerDone(int layer);
  // Whether the layers handed over so far have left this job: packed, or dropped for its end.
  bool HasLeft(size_t job) const;
  // Waits until that is so for every job, and tells so by `left` of each as soon as it is. Not OK:
  // as WaitForSlot, and `left` is not called any more.
  absl::Status End(absl::FunctionRef<void(size_t job)> left);

 private:
  // What a finished layer holds of one prompt.
  struct Part {
    int64_t next_block;  // the first that no thread has taken
    int64_t end_block;
    int frames_underway;  // taken, not done
    bool untaken() const { return next_block < end_block; }
    bool open() const { return untaken() || frames_underway > 0; }
  };

  // A finished layer until all of its parts are closed.
  struct Layer {
    int index;
    std::vector<Part> parts;  // [jobs]
    int open_parts;
  };

  struct Frame {
    int layer;
    size_t job;
    int64_t first_block;
    int64_t num_blocks;
  };

  void Run();
  bool HasUntaken() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  std::vector<std::shared_ptr<PrefillJob>> NextJobs() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  StagingRing::Lease WaitForBuffer(absl::Span<const std::shared_ptr<PrefillJob>> jobs,
                                   int64_t changes);
  // nullopt: there is none any more.
  std::optional<Frame> TakeFrame(const StagingRing::Credit* credit)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishFrame(const Frame& frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropWhatNobodyWants() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseLayers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteChange() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status PackFrame(PrefillJob& job, model::PrefillSequence& sequence, const Frame& frame,
                         StagingRing::Lease buffer);

  StagingRing& ring_;
  const int kv_slots_;
  const std::function<void(int, int64_t)> on_frame_;

  std::atomic<bool> failed_ = false;  // status_ is not OK; what is left is dropped
  std::atomic<int64_t> changes_ = 0;  // of NextJobs

  mutable absl::Mutex mu_;
  std::vector<std::shared_ptr<PrefillJob>> jobs_ ABSL_GUARDED_BY(mu_);
  model::PrefillSequence* sequence_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::deque<Layer> layers_ ABSL_GUARDED_BY(mu_);     // finished, not yet released; oldest first
  std::vector<int> open_parts_ ABSL_GUARDED_BY(mu_);  // [jobs], over layers_
  size_t turn_ ABSL_GUARDED_BY(mu_) = 0;              // the job that comes first
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  bool stop_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_KV_STREAM_H_
