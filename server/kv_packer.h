// The packer turns finished layers into frames: it packs the KV of every pass into staging memory
// and hands it to the lanes while later layers compute.
#ifndef PREFILLD_SERVER_KV_PACKER_H_
#define PREFILLD_SERVER_KV_PACKER_H_

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <optional>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"
#include "server/clock.h"
#include "server/event_count.h"
#include "server/prefill_job.h"
#include "server/staging_ring.h"

namespace prefilld::server {

class Metrics;

// Owns the packing threads and a source for each pass that is under way, and fills the buffers of
// the staging ring.
//
// Each thread takes the next frame, packs it, computes its checksum and hands it to a lane. If the
// lane is idle, the same thread also writes the frame to it.
//
// The requests of all sources take turns, frame by frame. Within a source the oldest layer goes
// first, because its KV slot is the one that the compute waits for. KV that came from the prefix
// cache needs no layer to be done: that of all layers goes from the start on, out of the cache's
// memory, whenever no finished layer of its source has a frame to take.
//
// A request whose consumer is slow uses up its credit of staging memory, and then only its own
// frames wait. Its layers keep their KV slots meanwhile, so its source, and no other, runs out of
// room.
//
// Where a prompt has several receivers, each counts as such a request. While some are awaited, the
// source keeps the layers that it has.
//
// Thread-safe.
class KvPacker {
  struct Part;
  struct Request;
  struct Layer;
  struct State;

 public:
  struct Surroundings {
    StagingRing& ring;
    Metrics& metrics;
    Progress& progress;
    EventCount& wake;  // notified when a source has more room, or a request has left
  };

  // The layers of one pass, which closes it at its end.
  class Source {
   public:
    ~Source();  // closes it

    // Drops what is not packed yet and waits for the frames that are being packed. After that
    // nobody uses the sequence. It fails if the device has failed to pack, with the last frames
    // too.
    absl::Status Close();
    // Hands over the KV of all layers that came from the prefix cache, if there is any. The frames
    // of finished layers then begin behind it. Must be called before the first of those.
    void StartCached();
    // Hands over a finished layer, oldest first.
    void LayerDone(int layer);
    // Tells whether the sequence may compute one more layer, that is, whether fewer than kv_slots
    // layers are still held. It fails once the device has failed to pack.
    absl::StatusOr<bool> HasRoom() const;
    // Tells whether every frame of the layers handed over so far has left this receiver: it was
    // handed to a lane, or dropped because the receiver has ended.
    bool HasLeft(const PrefillJob& receiver) const;

   private:
    friend class KvPacker;
    Source(KvPacker& packer, std::unique_ptr<State> state);

    KvPacker& packer_;
    const std::unique_ptr<State> state_;  // guarded by the packer's lock
  };

  // If num_threads is 0, the caller packs by calling PackOne.
  KvPacker(const Surroundings& surroundings, int kv_slots, int num_threads);
  // All sources must be gone before.
  ~KvPacker();

  // Adds a source. Prompt i of the sequence belongs to jobs[i] and its others(). The sequence is
  // borrowed until the source is destroyed. A job has one source at most.
  std::unique_ptr<Source> Add(absl::Span<const std::shared_ptr<PrefillJob>> jobs,
                              model::PrefillSequence& sequence);

  // Looks for receivers that have joined the jobs of a source, and for those that are awaited no
  // longer. Must be called after either.
  void AdmitReceivers();

  // Packs one frame on the caller's thread. Returns false when none can be packed now.
  bool PackOne();

 private:
  struct Frame {
    State* source;
    size_t request;
    int prompt;
    int layer = 0;
    int64_t first_block = 0;
    int64_t num_blocks = 0;
    bool is_cached = false;  // its KV comes from the prefix cache
  };
  // A request that has frames to take.
  struct Candidate {
    int older_layers;  // of its source that have frames to take, too; cached KV comes behind all
    int64_t last_turn;
    std::shared_ptr<PrefillJob> job;
    std::shared_ptr<StagingRing::Credit> credit;
  };

  void Run();
  bool PackNext(bool wait) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<Candidate> NextRequests() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  StagingRing::Lease AcquireBuffer(absl::Span<const Candidate> candidates, int64_t changes,
                                   bool wait);
  std::optional<Frame> TakeFrame(const StagingRing::Credit* credit)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status PackFrame(const Frame& frame, PrefillJob& job, StagingRing::Lease buffer);
  void FinishFrame(const Frame& frame, const absl::Status& status)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  void AddLayer(State& source, int layer);
  void AddRequest(State& source, std::shared_ptr<PrefillJob> receiver, int prompt)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AddPart(const State& source, Layer& layer, Request& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartCached(State& source);
  void AddCached(const State& source, Request& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AdmitReceivers(State& source) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Remove(State& source);
  Frame Take(Part& part, Frame frame) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static Layer& LayerOf(State& source, int index);
  // Drops the frames that no thread has taken yet: all, or those of requests that have ended.
  void DropUntaken(State& source, bool all) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseLayers(State& source) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteChange() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Surroundings surroundings_;
  const int kv_slots_;

  // Counts the changes of what NextRequests would return, except for the order of turns.
  std::atomic<int64_t> changes_ = 0;

  absl::Mutex mu_;
  std::vector<State*> sources_ ABSL_GUARDED_BY(mu_);
  int64_t untaken_parts_ ABSL_GUARDED_BY(mu_) = 0;  // over all sources
  int64_t turns_ ABSL_GUARDED_BY(mu_) = 0;          // frames taken, ever
  bool stop_ ABSL_GUARDED_BY(mu_) = false;

  std::vector<std::thread> threads_;
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_KV_PACKER_H_
