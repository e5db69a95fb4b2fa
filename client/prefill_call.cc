#include "client/prefill_call.h"

#include <utility>

#include "absl/time/clock.h"
#include "client/async_call.h"
#include "grpcpp/channel.h"
#include "prefill/v1/resumption.pb.h"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::AttachLaneRequest;
using ::prefill::v1::PrefillResult;
using ::prefill::v1::ResumeRequest;

constexpr char kAttachLaneMethod[] = "/prefill.v1.PrefillService/AttachLane";
constexpr char kResumeMethod[] = "/prefill.v1.ResumptionService/Resume";

const Metadata kNoMetadata;

}  // namespace

PrefillCall::PrefillCall(const char* method, const google::protobuf::MessageLite& request,
                         ResumableRequest names, const PrefillCallOptions& options,
                         std::vector<std::shared_ptr<grpc::Channel>> channels,
                         SharedMemoryPool& memories, std::shared_ptr<SmallCalls> calls,
                         std::unique_ptr<Reception> reception)
    : call_{method, request, options.metadata},
      names_(std::move(names)),
      deadline_(options.deadline),
      channels_(std::move(channels)),
      acknowledger_(names_.resume_key.empty()
                        ? nullptr
                        : std::make_shared<Acknowledger>(std::move(calls), channels_[0], names_)),
      reception_(std::move(reception)),
      memories_(options.shared_memory ? &memories : nullptr),
      streams_(channels_.size()) {
  if (acknowledger_ != nullptr) reception_->AcknowledgeTo(acknowledger_);
}

absl::StatusOr<PrefillResult> PrefillCall::Run() {
  ReadLane(0, call_);
  for (std::thread& thread : lane_threads_) thread.join();
  const absl::Status ended = status();
  absl::StatusOr<PrefillResult> result =
      ended.ok() ? reception_->Finish() : absl::StatusOr<PrefillResult>(ended);
  if (IsResumable()) {
    result.ok() ? acknowledger_->Complete() : acknowledger_->Cancel();
  }
  if (result.ok() && memories_ != nullptr) {
    if (auto memory = reception_->TakeSharedMemory()) memories_->Keep(std::move(memory));
  }
  return result;
}

void PrefillCall::Fail(absl::Status reason) {
  absl::MutexLock lock(&mu_);
  if (!status_.ok()) return;
  status_ = std::move(reason);
  for (const auto& stream : streams_) {
    if (stream != nullptr) stream->Cancel();
  }
}

absl::Status PrefillCall::status() {
  absl::MutexLock lock(&mu_);
  return status_;
}

// Reads a lane to its end, on one stream after the other if the request is resumable.
void PrefillCall::ReadLane(uint32_t lane, const Opening& first) {
  absl::Status ended = ReadStream(lane, first);
  wire::LanePatience patience;
  while (!ended.ok() && MayResume()) {
    if (!ReadOn(lane, first, patience, ended)) break;
  }
  // The result comes when every lane has everything, so a lane that breaks after it is done.
  const bool is_done = acknowledger_ != nullptr && reception_->has_result();
  if (!ended.ok() && !is_done) Fail(std::move(ended));
}

bool PrefillCall::IsResumable() const {
  if (acknowledger_ == nullptr) return false;
  return accepted() == nullptr || accepted()->resume_window_ms() > 0;
}

bool PrefillCall::MayResume() const {
  return IsResumable() && !reception_->refused_by_sink() && !reception_->is_beyond_repair() &&
         !reception_->has_result();
}

// Attaches a lane again that has broken, and reads on. Returns false when there is no more to do:
// `ended` is the reason then.
bool PrefillCall::ReadOn(uint32_t lane, const Opening& first, wire::LanePatience& patience,
                         absl::Status& ended) {
  wire::LanePatience::State state{.accepted = accepted() != nullptr,
                                  .progress = reception_->progress()};
  if (state.accepted) state.window = absl::Milliseconds(accepted()->resume_window_ms());
  const wire::LanePatience::Next next = patience.OnBroken(ended, state, absl::Now());
  if (next == wire::LanePatience::Next::kGiveUp) {
    ended = patience.reason();
    return false;
  }
  {
    absl::MutexLock lock(&mu_);
    const auto failed = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return !status_.ok(); };
    if (mu_.AwaitWithTimeout(absl::Condition(&failed), patience.pause())) return false;
  }
  if (next == wire::LanePatience::Next::kStartAnew) {
    ended = ReadStream(lane, first);
    return true;
  }
  ResumeRequest resume;
  resume.set_request_id(names_.id);
  resume.set_resume_key(names_.resume_key);
  resume.set_receiver(names_.receiver);
  resume.set_lane(lane);
  resume.set_received(reception_->received(lane));
  ended = ReadStream(lane, {kResumeMethod, resume, kNoMetadata, /*resumes=*/true});
  return true;
}

// Returns OK when everything of the lane has come.
absl::Status PrefillCall::ReadStream(uint32_t lane, const Opening& opening) {
  auto next = std::make_unique<RawStream>(channels_[lane]);
  RawStream* const stream = next.get();
  {
    absl::MutexLock lock(&mu_);
    if (!status_.ok()) return status_;
    streams_[lane].swap(next);
  }
  next.reset();  // the stream before; waits for its end
  stream->Start(opening.method, opening.request, deadline_, opening.metadata);
  grpc::ByteBuffer message;
  bool is_first = true;
  while (stream->Read(message)) {
    // The first message shows that the server knows who has resumed.
    if (std::exchange(is_first, false) && opening.resumes) reception_->UseSharedMemoryAgain();
    if (absl::Status taken = reception_->Take(lane, message); !taken.ok()) {
      stream->Cancel();
      return taken;
    }
    if (lane == 0 && accepted() != nullptr && !std::exchange(was_accepted_, true)) OnAccepted();
  }
  PREFILLD_RETURN_IF_ERROR(EndOfStream(stream->Finish()));
  if (lane == 0 && !reception_->has_result()) {
    return absl::DataLossError("the stream ended without a result");
  }
  return absl::OkStatus();
}

void PrefillCall::OnAccepted() {
  ReadOtherLanes();  // at once, for the server does not wait long for them
  if (memories_ != nullptr) reception_->AttachSharedMemory(*memories_);
}

void PrefillCall::ReadOtherLanes() {
  const Accepted& accepted = *reception_->accepted();
  for (uint32_t lane = 1; lane < accepted.num_lanes(); ++lane) {
    AttachLaneRequest attach;
    attach.set_request_id(accepted.request_id());
    attach.set_receiver(accepted.receiver());
    attach.set_lane(lane);
    attach.set_lane_key(accepted.lane_key());
    lane_threads_.emplace_back([this, lane, attach = std::move(attach)] {
      ReadLane(lane, {kAttachLaneMethod, attach, kNoMetadata});
    });
  }
}

}  // namespace prefilld::client
