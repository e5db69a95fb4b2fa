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

void KvStream::Begin(absl::Span<const std::shared_ptr<PrefillJob>> jobs,
                     model::PrefillSequence& sequence) {
  absl::MutexLock lock(&mu_);
  jobs_.assign(jobs.begin(), jobs.end());
  open_parts_.assign(jobs.size(), 0);
  turn_ = 0;
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

// Takes a few words per job from the heap.
void KvStream::LayerDone(int layer) {
  absl::MutexLock lock(&mu_);
  Layer done = {.index = layer, .parts = {}, .open_parts = 0};
  for (size_t i = 0; i < jobs_.size(); ++i) {
    const auto& layout = jobs_[i]->work().layout;
    // Nothing, where the consumer has every block already.
    const Part& part = done.parts.emplace_back(Part{layout.first_block(), layout.num_blocks(), 0});
    done.open_parts += part.open() ? 1 : 0;
    open_parts_[i] += part.open() ? 1 : 0;
  }
  layers_.push_back(std::move(done));
  NoteChange();
  ReleaseLayers();
}

bool KvStream::HasLeft(size_t job) const {
  absl::MutexLock lock(&mu_);
  return open_parts_[job] == 0 && status_.ok();
}

absl::Status KvStream::End(absl::FunctionRef<void(size_t job)> left) {
  absl::MutexLock lock(&mu_);
  std::vector<bool> told(jobs_.size(), false);
  for (size_t i = 0; i < told.size(); ++i) {
    const auto next = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      size_t job = 0;
      while (job < told.size() && (told[job] || open_parts_[job] > 0)) ++job;
      return job;
    };
    const auto there_is_one = [&] { return next() < told.size(); };
    mu_.Await(absl::Condition(&there_is_one));
    const size_t job = next();
    told[job] = true;
    if (!status_.ok()) continue;
    mu_.Unlock();
    left(job);
    mu_.Lock();
  }
  jobs_.clear();
  sequence_ = nullptr;
  failed_ = false;
  return std::exchange(status_, absl::OkStatus());
}

bool KvStream::HasUntaken() const {
  return std::any_of(layers_.begin(), layers_.end(), [](const Layer& layer) {
    return std::any_of(layer.parts.begin(), layer.parts.end(),
                       [](const Part& part) { return part.untaken(); });
  });
}

void KvStream::Run() {
  const auto wake = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stop_ || HasUntaken(); };
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(&wake));
    if (stop_) return;
    DropWhatNobodyWants();
    const std::vector<std::shared_ptr<PrefillJob>> jobs = NextJobs();
    if (jobs.empty()) continue;
    const int64_t changes = changes_;

    mu_.Unlock();
    StagingRing::Lease buffer = WaitForBuffer(jobs, changes);
    mu_.Lock();

    if (!buffer) continue;
    const std::optional<Frame> frame = TakeFrame(buffer.credit());
    if (!frame.has_value()) continue;
    PrefillJob& job = *jobs_[frame->job];
    model::PrefillSequence& sequence = *sequence_;

    mu_.Unlock();
    const absl::Status status = PackFrame(job, sequence, *frame, std::move(buffer));
    mu_.Lock();

    status_.Update(status);
    if (!status_.ok()) failed_ = true;
    FinishFrame(*frame);
  }
}

// Those that have frames to take, who comes first first.
std::vector<std::shared_ptr<PrefillJob>> KvStream::NextJobs() const {
  std::vector<std::shared_ptr<PrefillJob>> next;
  std::vector<bool> listed(jobs_.size(), false);
  for (const Layer& layer : layers_) {
    for (size_t i = 0; i < jobs_.size(); ++i) {
      const size_t job = (turn_ + i) % jobs_.size();
      if (listed[job] || !layer.parts[job].untaken()) continue;
      listed[job] = true;
      next.push_back(jobs_[job]);
    }
  }
  return next;
}

// Gives up when there are other jobs to wait for than `jobs`: another thread took the last frame of
// one, or a layer is done.
StagingRing::Lease KvStream::WaitForBuffer(absl::Span<const std::shared_ptr<PrefillJob>> jobs,
                                           int64_t changes) {
  std::vector<std::shared_ptr<StagingRing::Credit>> credits;
  for (const auto& job : jobs) credits.push_back(job->credit());
  return ring_.Acquire(credits, [&] {
    return changes_ != changes ||
           std::any_of(jobs.begin(), jobs.end(), [](const auto& job) { return job->ended(); });
  });
}

std::optional<KvStream::Frame> KvStream::TakeFrame(const StagingRing::Credit* credit) {
  const auto owner = std::find_if(jobs_.begin(), jobs_.end(), [credit](const auto& job) {
    return job->credit().get() == credit;
  });
  if (owner == jobs_.end()) return std::nullopt;
  const size_t job = owner - jobs_.begin();
  const auto layer = std::find_if(layers_.begin(), layers_.end(), [job](const Layer& candidate) {
    return candidate.parts[job].untaken();
  });
  if (layer == layers_.end()) return std::nullopt;
  const int64_t blocks_per_frame = std::max<int64_t>(
      1, static_cast<int64_t>(ring_.buffer_bytes()) / BlockBytes((*owner)->work().layout));
  Part& part = layer->parts[job];
  const Frame frame = {.layer = layer->index,
                       .job = job,
                       .first_block = part.next_block,
                       .num_blocks = std::min(blocks_per_frame, part.end_block - part.next_block)};
  part.next_block += frame.num_blocks;
  ++part.frames_underway;
  turn_ = (job + 1) % jobs_.size();
  if (!part.untaken()) NoteChange();
  return frame;
}

void KvStream::FinishFrame(const Frame& frame) {
  Layer& layer = *std::find_if(layers_.begin(), layers_.end(), [&](const Layer& candidate) {
    return candidate.index == frame.layer;
  });
  Part& part = layer.parts[frame.job];
  --part.frames_underway;
  if (part.open()) return;
  --layer.open_parts;
  --open_parts_[frame.job];
  ReleaseLayers();
}

void KvStream::DropWhatNobodyWants() {
  bool dropped = false;
  for (Layer& layer : layers_) {
    for (size_t job = 0; job < jobs_.size(); ++job) {
      Part& part = layer.parts[job];
      if (!part.untaken() || !(failed_ || jobs_[job]->ended())) continue;
      part.next_block = part.end_block;
      dropped = true;
      if (part.open()) continue;
      --layer.open_parts;
      --open_parts_[job];
    }
  }
  if (dropped) NoteChange();
  ReleaseLayers();
}

// Wakes the threads that wait for buffers of jobs they found before.
void KvStream::NoteChange() {
  ++changes_;
  ring_.AskAgain();
}

void KvStream::ReleaseLayers() {
  const auto is_done = [this](const Layer& layer) {
    if (layer.open_parts > 0) return false;
    sequence_->ReleaseKv(layer.index);
    return true;
  };
  layers_.erase(std::remove_if(layers_.begin(), layers_.end(), is_done), layers_.end());
}

// OK, without packing, when the job has ended or packing has failed.
absl::Status KvStream::PackFrame(PrefillJob& job, model::PrefillSequence& sequence,
                                 const Frame& frame, StagingRing::Lease buffer) {
  if (job.ended() || failed_) return absl::OkStatus();
  const auto& layout = job.work().layout;
  model::KvSelection selection = SelectBlocks(layout, frame.first_block, frame.num_blocks);
  selection.prompt = static_cast<int>(frame.job);
  const absl::Status packed = sequence.PackKv(frame.layer, selection, buffer.data());
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
