#include "server/kv_stream.h"

#include <algorithm>
#include <utility>

namespace prefilld::server {

KvStream::KvStream(StagingRing& ring, int kv_slots, std::function<void(int, int64_t)> on_frame)
    : ring_(ring),
      kv_slots_(kv_slots),
      on_frame_(std::move(on_frame)),
      thread_([this] { Run(); }) {}

KvStream::~KvStream() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
}

void KvStream::Begin(PrefillJob& job, model::PrefillSequence& sequence) {
  absl::MutexLock lock(&mu_);
  job_ = &job;
  sequence_ = &sequence;
}

// The packing thread lets go of a job that has ended within milliseconds, so the wait needs no
// second way out.
absl::Status KvStream::WaitForSlot() {
  absl::MutexLock lock(&mu_);
  const auto free_slot = [this]()
                             ABSL_SHARED_LOCKS_REQUIRED(mu_) { return held_slots_ < kv_slots_; };
  mu_.Await(absl::Condition(&free_slot));
  return status_;
}

void KvStream::LayerDone(int layer) {
  absl::MutexLock lock(&mu_);
  ++held_slots_;
  finished_layers_.push_back(layer);
}

absl::Status KvStream::End() {
  absl::MutexLock lock(&mu_);
  const auto packed = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return held_slots_ == 0; };
  mu_.Await(absl::Condition(&packed));
  job_ = nullptr;
  sequence_ = nullptr;
  return std::exchange(status_, absl::OkStatus());
}

void KvStream::Run() {
  const auto wake = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return stop_ || !finished_layers_.empty();
  };
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(&wake));
    if (stop_) return;
    const int layer = finished_layers_.front();
    finished_layers_.pop_front();
    PrefillJob& job = *job_;
    model::PrefillSequence& sequence = *sequence_;

    mu_.Unlock();
    const absl::Status status = PackLayer(job, sequence, layer);
    sequence.ReleaseKv(layer);
    mu_.Lock();

    status_.Update(status);
    --held_slots_;
  }
}

// Stops early, with OK, when the job has ended.
absl::Status KvStream::PackLayer(PrefillJob& job, model::PrefillSequence& sequence, int layer) {
  const auto& layout = job.work().layout;
  const int64_t block_bytes = BlockBytes(layout);
  const int64_t blocks_per_frame =
      std::max<int64_t>(1, static_cast<int64_t>(ring_.buffer_bytes()) / block_bytes);

  for (int64_t block = layout.first_block(); block < layout.num_blocks();
       block += blocks_per_frame) {
    const int64_t num_blocks = std::min<int64_t>(blocks_per_frame, layout.num_blocks() - block);
    StagingRing::Lease buffer = ring_.Acquire(job.credit(), [&job] { return job.ended(); });
    if (!buffer || job.ended()) return absl::OkStatus();

    const absl::Status packed =
        sequence.PackKv(layer, SelectBlocks(layout, block, num_blocks), buffer.data());
    if (!packed.ok()) return packed;

    const size_t payload_bytes = num_blocks * block_bytes;
    FrameHeader header;
    header.layer = static_cast<uint32_t>(layer);
    header.first_block = static_cast<uint32_t>(block);
    header.num_blocks = static_cast<uint32_t>(num_blocks);
    header.checksum = Checksum(buffer.data(), payload_bytes);
    const int lane = job.delivery().SendFrame(header, std::move(buffer), payload_bytes);
    on_frame_(lane, static_cast<int64_t>(payload_bytes));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::server
