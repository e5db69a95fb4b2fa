#include "server/kv_stream.h"

#include <algorithm>
#include <utility>

namespace prefilld::server {

KvStream::KvStream(StagingRing& ring, int kv_slots, int num_threads,
                   std::function<void(int, int64_t)> on_frame)
    : ring_(ring), kv_slots_(kv_slots), on_frame_(std::move(on_frame)) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Run(); });
}

KvStream::~KvStream() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

void KvStream::Begin(PrefillJob& job, model::PrefillSequence& sequence) {
  absl::MutexLock lock(&mu_);
  job_ = &job;
  sequence_ = &sequence;
}

// The packing threads let go of a job that has ended within milliseconds, so the wait needs no
// second way out.
absl::Status KvStream::WaitForSlot() {
  absl::MutexLock lock(&mu_);
  const auto free_slot = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return layers_.size() < static_cast<size_t>(kv_slots_);
  };
  mu_.Await(absl::Condition(&free_slot));
  return status_;
}

void KvStream::LayerDone(int layer) {
  absl::MutexLock lock(&mu_);
  const auto& layout = job_->work().layout;
  if (layout.first_block() == layout.num_blocks()) {  // the consumer has every block already
    sequence_->ReleaseKv(layer);
    return;
  }
  layers_.push_back({layer, layout.first_block(), 0});
}

absl::Status KvStream::End() {
  absl::MutexLock lock(&mu_);
  const auto packed = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return layers_.empty(); };
  mu_.Await(absl::Condition(&packed));
  job_ = nullptr;
  sequence_ = nullptr;
  failed_ = false;
  return std::exchange(status_, absl::OkStatus());
}

void KvStream::Run() {
  const auto wake = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
    return stop_ || std::any_of(layers_.begin(), layers_.end(), [this](const Layer& layer) {
             return layer.next_block < job_->work().layout.num_blocks();
           });
  };
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(&wake));
    if (stop_) return;
    const Frame frame = TakeFrame();
    PrefillJob& job = *job_;
    model::PrefillSequence& sequence = *sequence_;

    mu_.Unlock();
    const absl::Status status = PackFrame(job, sequence, frame);
    mu_.Lock();

    status_.Update(status);
    if (!status_.ok()) failed_ = true;
    FinishFrame(frame);
  }
}

KvStream::Frame KvStream::TakeFrame() {
  const auto& layout = job_->work().layout;
  const int64_t blocks_per_frame =
      std::max<int64_t>(1, static_cast<int64_t>(ring_.buffer_bytes()) / BlockBytes(layout));
  Layer& layer = *std::find_if(layers_.begin(), layers_.end(), [&](const Layer& candidate) {
    return candidate.next_block < layout.num_blocks();
  });
  const Frame frame = {
      .layer = layer.index,
      .first_block = layer.next_block,
      .num_blocks = std::min<int64_t>(blocks_per_frame, layout.num_blocks() - layer.next_block)};
  layer.next_block += frame.num_blocks;
  ++layer.frames_underway;
  return frame;
}

void KvStream::FinishFrame(const Frame& frame) {
  const auto layer = std::find_if(layers_.begin(), layers_.end(), [&](const Layer& candidate) {
    return candidate.index == frame.layer;
  });
  --layer->frames_underway;
  if (layer->frames_underway > 0 || layer->next_block < job_->work().layout.num_blocks()) return;
  sequence_->ReleaseKv(frame.layer);
  layers_.erase(layer);
}

// OK, without packing, when the job has ended or packing has failed.
absl::Status KvStream::PackFrame(PrefillJob& job, model::PrefillSequence& sequence,
                                 const Frame& frame) {
  const auto over = [&] { return job.ended() || failed_; };
  if (over()) return absl::OkStatus();
  StagingRing::Lease buffer = ring_.Acquire(job.credit(), over);
  if (!buffer || over()) return absl::OkStatus();

  const auto& layout = job.work().layout;
  const absl::Status packed = sequence.PackKv(
      frame.layer, SelectBlocks(layout, frame.first_block, frame.num_blocks), buffer.data());
  if (!packed.ok()) return packed;

  const size_t payload_bytes = frame.num_blocks * BlockBytes(layout);
  FrameHeader header;
  header.layer = static_cast<uint32_t>(frame.layer);
  header.first_block = static_cast<uint32_t>(frame.first_block);
  header.num_blocks = static_cast<uint32_t>(frame.num_blocks);
  header.checksum = Checksum(buffer.data(), payload_bytes);
  const int lane = job.delivery().SendFrame(header, std::move(buffer), payload_bytes);
  on_frame_(lane, static_cast<int64_t>(payload_bytes));
  return absl::OkStatus();
}

}  // namespace prefilld::server
