#include "server/kv_packer.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "proto/status_macros.h"
#include "proto/wire/kv_layout.h"
#include "server/metrics.h"

namespace prefilld::server {

// The blocks of one prompt in a finished layer, or those of all layers that are in the prefix
// cache.
struct KvPacker::Part {
  int64_t next_block = 0;  // the first that no thread has taken
  int64_t end_block = 0;
  int frames_underway = 0;  // taken, not done

  bool untaken() const { return next_block < end_block; }
  bool open() const { return untaken() || frames_underway > 0; }
};

// One receiver of a prompt, over all layers.
struct KvPacker::Request {
  std::shared_ptr<PrefillJob> job;
  int prompt = 0;  // of the sequence
  // Its blocks of the prefix cache, layer after layer: block first_cached + i of layer l is number
  // l * cached_per_layer + i.
  Part cached = {};
  int64_t first_cached = 0;
  int64_t cached_per_layer = 0;
  int open_parts = 0;     // `cached` included
  int64_t last_turn = 0;  // value of turns_ at its latest turn
};

// A finished layer until all of its parts are closed.
struct KvPacker::Layer {
  int index;
  std::vector<Part> parts;  // [requests]
  int open_parts = 0;
};

// The state of a source. The packer's lock guards all of it but what is constant or atomic.
struct KvPacker::State {
  explicit State(model::PrefillSequence& sequence) : sequence(sequence) {}

  model::PrefillSequence& sequence;
  std::vector<std::shared_ptr<PrefillJob>> jobs;  // [prompts]
  std::vector<Request> requests;                  // the jobs' own, then those that have joined them
  int64_t cached_tokens = 0;                      // whose KV comes from the prefix cache
  bool awaits_receivers = false;                  // no layer is released
  std::deque<Layer> layers;                       // finished and not released, oldest first
  int frames_underway = 0;
  absl::Status status;               // failure of packing
  std::atomic<bool> failed = false;  // status is not OK; what is left is dropped
};

KvPacker::Source::Source(KvPacker& packer, std::unique_ptr<State> state)
    : packer_(packer), state_(std::move(state)) {}

// Whoever wants to know of a failure has closed the source.
KvPacker::Source::~Source() { Close().IgnoreError(); }

absl::Status KvPacker::Source::Close() { return packer_.Remove(*state_); }

void KvPacker::Source::StartCached() { packer_.StartCached(*state_); }

void KvPacker::Source::LayerDone(int layer) { packer_.AddLayer(*state_, layer); }

absl::StatusOr<bool> KvPacker::Source::HasRoom() const {
  absl::MutexLock lock(&packer_.mu_);
  PREFILLD_RETURN_IF_ERROR(state_->status);
  return state_->layers.size() < static_cast<size_t>(packer_.kv_slots_);
}

bool KvPacker::Source::HasLeft(const PrefillJob& receiver) const {
  absl::MutexLock lock(&packer_.mu_);
  const auto request =
      std::find_if(state_->requests.begin(), state_->requests.end(),
                   [&receiver](const Request& entry) { return entry.job.get() == &receiver; });
  return request != state_->requests.end() && request->open_parts == 0 && state_->status.ok();
}

KvPacker::KvPacker(const Surroundings& surroundings, int kv_slots, int num_threads)
    : surroundings_(surroundings), kv_slots_(kv_slots) {
  for (int i = 0; i < num_threads; ++i) threads_.emplace_back([this] { Run(); });
}

KvPacker::~KvPacker() {
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  for (std::thread& thread : threads_) thread.join();
}

std::unique_ptr<KvPacker::Source> KvPacker::Add(absl::Span<const std::shared_ptr<PrefillJob>> jobs,
                                                model::PrefillSequence& sequence) {
  auto state = std::make_unique<State>(sequence);
  state->jobs.assign(jobs.begin(), jobs.end());
  absl::MutexLock lock(&mu_);
  for (const auto& job : jobs) {
    AddRequest(*state, job, static_cast<int>(state->requests.size()));
    if (job->work().num_receivers > 1) state->awaits_receivers = true;
  }
  AdmitReceivers(*state);
  sources_.push_back(state.get());
  return std::unique_ptr<Source>(new Source(*this, std::move(state)));
}

// Does nothing more for a source that was removed before.
absl::Status KvPacker::Remove(State& source) {
  absl::MutexLock lock(&mu_);
  source.awaits_receivers = false;
  DropUntaken(source, /*all=*/true);
  const auto unused = [&source] { return source.frames_underway == 0; };
  mu_.Await(absl::Condition(&unused));
  sources_.erase(std::remove(sources_.begin(), sources_.end(), &source), sources_.end());
  return source.status;
}

void KvPacker::StartCached(State& source) {
  absl::MutexLock lock(&mu_);
  source.cached_tokens = source.sequence.cached_tokens();
  for (Request& request : source.requests) AddCached(source, request);
  NoteChange();
}

void KvPacker::AddCached(const State& source, Request& request) {
  const PrefillWork& work = request.job->work();
  const int64_t end = source.cached_tokens / work.layout.block_tokens();
  request.first_cached = work.layout.first_block();
  request.cached_per_layer = work.takes_kv ? std::max<int64_t>(0, end - request.first_cached) : 0;
  request.cached = {0, request.cached_per_layer * work.layout.num_layers()};
  if (!request.cached.open()) return;
  ++request.open_parts;
  ++untaken_parts_;
}

// Allocates a few words per request.
void KvPacker::AddLayer(State& source, int layer) {
  absl::MutexLock lock(&mu_);
  Layer& done = source.layers.emplace_back(Layer{.index = layer, .parts = {}});
  for (Request& request : source.requests) AddPart(source, done, request);
  NoteChange();
  ReleaseLayers(source);
}

void KvPacker::AddPart(const State& source, Layer& layer, Request& request) {
  const auto& layout = request.job->work().layout;
  const int64_t first =
      std::max<int64_t>(layout.first_block(), source.cached_tokens / layout.block_tokens());
  const Part& part = layer.parts.emplace_back(
      request.job->work().takes_kv ? Part{first, layout.num_blocks()} : Part{});
  if (!part.open()) return;  // the consumer has every block already, or gets it from the cache
  ++layer.open_parts;
  ++request.open_parts;
  ++untaken_parts_;
}

// The layers finished so far are all there if the receiver was awaited until now.
void KvPacker::AddRequest(State& source, std::shared_ptr<PrefillJob> receiver, int prompt) {
  Request& request = source.requests.emplace_back();
  request.job = std::move(receiver);
  request.prompt = prompt;
  AddCached(source, request);
  for (Layer& layer : source.layers) AddPart(source, layer, request);
}

void KvPacker::AdmitReceivers() {
  absl::MutexLock lock(&mu_);
  for (State* source : sources_) {
    if (source->awaits_receivers) ReleaseLayers(*source);
  }
}

void KvPacker::AdmitReceivers(State& source) {
  if (!source.awaits_receivers) return;
  source.awaits_receivers = false;
  for (size_t i = 0; i < source.jobs.size(); ++i) {
    const OtherReceivers::Present others = source.jobs[i]->others();
    source.awaits_receivers |= others.awaited;
    for (const auto& receiver : others.jobs) {
      const bool is_known =
          std::any_of(source.requests.begin(), source.requests.end(),
                      [&receiver](const Request& entry) { return entry.job == receiver; });
      if (is_known) continue;
      AddRequest(source, receiver, static_cast<int>(i));
      NoteChange();
    }
  }
  // The pass may be waiting for nothing else.
  if (!source.awaits_receivers) surroundings_.wake.Notify();
}

void KvPacker::Run() {
  const auto wake = [this]()
                        ABSL_SHARED_LOCKS_REQUIRED(mu_) { return stop_ || untaken_parts_ > 0; };
  absl::MutexLock lock(&mu_);
  while (true) {
    mu_.Await(absl::Condition(&wake));
    if (stop_) return;
    PackNext(/*wait=*/true);
  }
}

bool KvPacker::PackOne() {
  absl::MutexLock lock(&mu_);
  return PackNext(/*wait=*/false);
}

bool KvPacker::PackNext(bool wait) {
  for (State* source : sources_) DropUntaken(*source, /*all=*/false);
  const std::vector<Candidate> candidates = NextRequests();
  if (candidates.empty()) return false;
  const int64_t changes = changes_;

  mu_.Unlock();
  StagingRing::Lease buffer = AcquireBuffer(candidates, changes, wait);
  mu_.Lock();

  if (!buffer) return false;
  const std::optional<Frame> frame = TakeFrame(buffer.credit());
  if (!frame.has_value()) return false;
  const std::shared_ptr<PrefillJob> job = frame->source->requests[frame->request].job;

  mu_.Unlock();
  const absl::Status status = PackFrame(*frame, *job, std::move(buffer));
  mu_.Lock();

  FinishFrame(*frame, status);
  return true;
}

// Lists the requests that may go next, first choice first. The oldest layer of each source comes
// first and cached KV last, and among those requests the one that has waited longest for a turn.
std::vector<KvPacker::Candidate> KvPacker::NextRequests() const {
  std::vector<Candidate> candidates;
  for (const State* source : sources_) {
    std::vector<bool> listed(source->requests.size(), false);
    int older_layers = 0;
    for (const Layer& layer : source->layers) {
      bool has_untaken = false;
      for (size_t i = 0; i < layer.parts.size(); ++i) {
        if (!layer.parts[i].untaken()) continue;
        has_untaken = true;
        if (listed[i]) continue;
        listed[i] = true;
        const Request& request = source->requests[i];
        candidates.push_back({older_layers, request.last_turn, request.job, request.job->credit()});
      }
      older_layers += has_untaken ? 1 : 0;
    }
    for (size_t i = 0; i < source->requests.size(); ++i) {
      const Request& request = source->requests[i];
      if (listed[i] || !request.cached.untaken()) continue;
      candidates.push_back({older_layers, request.last_turn, request.job, request.job->credit()});
    }
  }
  std::stable_sort(
      candidates.begin(), candidates.end(), [](const Candidate& a, const Candidate& b) {
        return std::tie(a.older_layers, a.last_turn) < std::tie(b.older_layers, b.last_turn);
      });
  return candidates;
}

// Gives up when the requests to wait for are no longer `candidates`: another thread took the last
// frame of one, a layer is done, or a source is removed.
StagingRing::Lease KvPacker::AcquireBuffer(absl::Span<const Candidate> candidates, int64_t changes,
                                           bool wait) {
  std::vector<std::shared_ptr<StagingRing::Credit>> credits;
  for (const Candidate& candidate : candidates) credits.push_back(candidate.credit);
  return surroundings_.ring.Acquire(credits, [&] {
    return !wait || changes_ != changes ||
           std::any_of(candidates.begin(), candidates.end(),
                       [](const Candidate& candidate) { return candidate.job->ended(); });
  });
}

// Returns nullopt when another thread took the last frame of that request, or the frame was
// dropped.
std::optional<KvPacker::Frame> KvPacker::TakeFrame(const StagingRing::Credit* credit) {
  for (State* source : sources_) {
    const auto owner = std::find_if(
        source->requests.begin(), source->requests.end(),
        [credit](const Request& request) { return request.job->credit().get() == credit; });
    if (owner == source->requests.end()) continue;
    const size_t i = owner - source->requests.begin();
    Frame frame = {.source = source, .request = i, .prompt = owner->prompt};
    const auto layer =
        std::find_if(source->layers.begin(), source->layers.end(),
                     [i](const Layer& candidate) { return candidate.parts[i].untaken(); });
    if (layer != source->layers.end()) {
      Part& part = layer->parts[i];
      frame.layer = layer->index;
      frame.first_block = part.next_block;
      frame.num_blocks = part.end_block - part.next_block;
      return Take(part, frame);
    }
    if (!owner->cached.untaken()) return std::nullopt;
    const int64_t blocks_before = owner->cached.next_block % owner->cached_per_layer;
    frame.layer = static_cast<int>(owner->cached.next_block / owner->cached_per_layer);
    frame.first_block = owner->first_cached + blocks_before;
    frame.num_blocks = owner->cached_per_layer - blocks_before;
    frame.is_cached = true;
    return Take(owner->cached, frame);
  }
  return std::nullopt;
}

// Takes as much of the frame, which holds all that the part has left in its layer, as fits into a
// buffer.
KvPacker::Frame KvPacker::Take(Part& part, Frame frame) {
  Request& request = frame.source->requests[frame.request];
  const int64_t blocks_per_frame =
      std::max<int64_t>(1, static_cast<int64_t>(surroundings_.ring.buffer_bytes()) /
                               wire::KvPairBytes(request.job->work().layout));
  frame.num_blocks = std::min(blocks_per_frame, frame.num_blocks);
  part.next_block += frame.num_blocks;
  ++part.frames_underway;
  ++frame.source->frames_underway;
  request.last_turn = ++turns_;
  if (!part.untaken()) {
    --untaken_parts_;
    NoteChange();
  }
  return frame;
}

// Returns OK without packing when the request has ended or packing has failed.
absl::Status KvPacker::PackFrame(const Frame& frame, PrefillJob& job, StagingRing::Lease buffer) {
  if (job.ended() || frame.source->failed) return absl::OkStatus();
  const auto& layout = job.work().layout;
  model::KvSelection selection = SelectBlocks(layout, frame.first_block, frame.num_blocks);
  selection.prompt = frame.prompt;
  model::PrefillSequence& sequence = frame.source->sequence;
  PREFILLD_RETURN_IF_ERROR(frame.is_cached
                               ? sequence.PackCachedKv(frame.layer, selection, buffer.data())
                               : sequence.PackKv(frame.layer, selection, buffer.data()));

  KvFrame out;
  out.payload_bytes = frame.num_blocks * wire::KvPairBytes(layout);
  out.header.layer = static_cast<uint32_t>(frame.layer);
  out.header.first_block = static_cast<uint32_t>(frame.first_block);
  out.header.num_blocks = static_cast<uint32_t>(frame.num_blocks);
  out.header.checksum = wire::Checksum(buffer.data(), out.payload_bytes);
  out.payload = std::make_shared<StagingRing::Lease>(std::move(buffer));
  const auto payload_bytes = static_cast<int64_t>(out.payload_bytes);
  const bool is_shared = out.payload->region() != nullptr;
  const int lane = job.delivery().SendFrame(std::move(out));
  surroundings_.metrics.CountFrame(lane, payload_bytes, is_shared);
  surroundings_.progress.Record();
  return absl::OkStatus();
}

KvPacker::Layer& KvPacker::LayerOf(State& source, int index) {
  return *std::find_if(source.layers.begin(), source.layers.end(),
                       [index](const Layer& layer) { return layer.index == index; });
}

void KvPacker::FinishFrame(const Frame& frame, const absl::Status& status) {
  State& source = *frame.source;
  --source.frames_underway;
  source.status.Update(status);
  if (!source.status.ok() && !source.failed.exchange(true)) surroundings_.wake.Notify();
  Request& request = source.requests[frame.request];
  Layer* const layer = frame.is_cached ? nullptr : &LayerOf(source, frame.layer);
  Part& part = layer == nullptr ? request.cached : layer->parts[frame.request];
  --part.frames_underway;
  if (part.open()) return;
  if (--request.open_parts == 0) surroundings_.wake.Notify();
  if (layer == nullptr) return;
  --layer->open_parts;
  ReleaseLayers(source);
}

void KvPacker::DropUntaken(State& source, bool all) {
  bool dropped = false;
  // Returns whether the part is closed by it.
  const auto drop = [&](Part& part, Request& request) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!part.untaken() || !(all || source.failed || request.job->ended())) return false;
    part.next_block = part.end_block;
    --untaken_parts_;
    dropped = true;
    if (part.open()) return false;
    --request.open_parts;
    return true;
  };
  for (Layer& layer : source.layers) {
    for (size_t i = 0; i < layer.parts.size(); ++i) {
      if (drop(layer.parts[i], source.requests[i])) --layer.open_parts;
    }
  }
  for (Request& request : source.requests) drop(request.cached, request);
  if (!dropped) return;
  NoteChange();
  surroundings_.wake.Notify();
  ReleaseLayers(source);
}

void KvPacker::ReleaseLayers(State& source) {
  AdmitReceivers(source);
  if (source.awaits_receivers) return;
  const auto is_done = [&source](const Layer& layer) {
    if (layer.open_parts > 0) return false;
    source.sequence.ReleaseKv(layer.index);
    return true;
  };
  const auto end = std::remove_if(source.layers.begin(), source.layers.end(), is_done);
  if (end == source.layers.end()) return;
  source.layers.erase(end, source.layers.end());
  surroundings_.wake.Notify();
}

// Wakes the threads that wait for buffers of requests they found before.
void KvPacker::NoteChange() {
  ++changes_;
  surroundings_.ring.AskAgain();
}

}  // namespace prefilld::server
