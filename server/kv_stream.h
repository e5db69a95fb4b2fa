// From finished layers to frames: packs a layer's KV into staging while the next one computes.
#ifndef PREFILLD_SERVER_KV_STREAM_H_
#define PREFILLD_SERVER_KV_STREAM_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <thread>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "model/prefill_engine.h"
#include "server/prefill_job.h"
#include "server/staging_ring.h"

namespace prefilld::server {

// A packing thread and the ring it fills. One request at a time:
//   Begin, (WaitForSlot, LayerDone)*, End
// by the compute thread. Between Begin and End it borrows the job and the sequence.
//
// A request whose consumer is slow holds its credit of staging; then its finished layers keep their
// KV slots, and WaitForSlot pauses the compute.
class KvStream {
 public:
  // on_frame(lane, payload_bytes) is called by the packing thread for each frame handed over.
  KvStream(StagingRing& ring, int kv_slots, std::function<void(int, int64_t)> on_frame);
  ~KvStream();

  void Begin(PrefillJob& job, model::PrefillSequence& sequence);
  // Waits until the sequence may compute one more layer, or the job has ended. Not OK: the device
  // failed to pack.
  absl::Status WaitForSlot();
  void LayerDone(int layer);
  // Waits until every layer handed over has been packed or dropped. Not OK: as WaitForSlot.
  absl::Status End();

 private:
  void Run();
  absl::Status PackLayer(PrefillJob& job, model::PrefillSequence& sequence, int layer);

  StagingRing& ring_;
  const int kv_slots_;
  const std::function<void(int, int64_t)> on_frame_;

  absl::Mutex mu_;
  PrefillJob* job_ ABSL_GUARDED_BY(mu_) = nullptr;
  model::PrefillSequence* sequence_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::deque<int> finished_layers_ ABSL_GUARDED_BY(mu_);
  int held_slots_ ABSL_GUARDED_BY(mu_) = 0;  // finished layers not yet released
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  bool stop_ ABSL_GUARDED_BY(mu_) = false;

  std::thread thread_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_KV_STREAM_H_
