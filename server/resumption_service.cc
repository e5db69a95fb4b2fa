#include "server/resumption_service.h"

#include <utility>

#include <grpcpp/impl/codegen/proto_utils.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/connections.h"
#include "proto/wire/grpc_status.h"
#include "server/metrics.h"
#include "server/prefill_job.h"
#include "server/refusal_cause.h"
#include "server/request_log.h"
#include "server/scheduler.h"
#include "server/server_stream.h"
#include "server/tenant_identity.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

using Stream = grpc::ServerWriteReactor<grpc::ByteBuffer>;

// The search for each takes time in proportion to the frames that a request may hold.
constexpr int kMaxDamaged = 64;

absl::Status Over(const absl::Status& status) { return Because(RefusalCause::kOver, status); }

}  // namespace

ResumptionService::ResumptionService(Scheduler& scheduler, Metrics& metrics,
                                     wire::Arrivals& arrivals)
    : scheduler_(scheduler), metrics_(metrics) {
  using grpc::CallbackServerContext;
  using Resuming =
      grpc::internal::CallbackServerStreamingHandler<grpc::ByteBuffer, grpc::ByteBuffer>;
  using Acknowledging =
      grpc::internal::CallbackUnaryHandler<v1::AcknowledgeRequest, v1::AcknowledgeResponse>;
  using Cancelling = grpc::internal::CallbackUnaryHandler<v1::CancelRequest, v1::CancelResponse>;
  WatchArrival(arrivals, 0,
               new Resuming([this](CallbackServerContext* context, const grpc::ByteBuffer* bytes) {
                 return Resume(context, bytes);
               }));
  WatchArrival(arrivals, 1,
               new Acknowledging([this](CallbackServerContext* context,
                                        const v1::AcknowledgeRequest* request,
                                        v1::AcknowledgeResponse* response) {
                 return Acknowledge(context, request, response);
               }));
  WatchArrival(
      arrivals, 2,
      new Cancelling(
          [this](CallbackServerContext* context, const v1::CancelRequest* request,
                 v1::CancelResponse* response) { return Cancel(context, request, response); }));
}

template <typename Message>
absl::StatusOr<std::shared_ptr<PrefillJob>> ResumptionService::Find(const Message& message) const {
  std::shared_ptr<PrefillJob> job = scheduler_.Find(message.request_id(), message.receiver());
  if (job == nullptr || !job->outlives_call()) {
    return Over(absl::NotFoundError("request_id: no such resumable request runs"));
  }
  if (!IsSameKey(message.resume_key(), job->work().resume_key)) {
    return absl::PermissionDeniedError("resume_key: not the one of this request");
  }
  return job;
}

void ResumptionService::NoteRefused(const char* method, const std::string& request_id,
                                    const grpc::CallbackServerContext& context,
                                    const absl::Status& status) const {
  bool trace_ignored = false;
  const Caller caller = CallerOf(context, &trace_ignored);
  if (trace_ignored) metrics_.CountIgnoredTrace();
  metrics_.CountRefusal(status);
  LogRefusedCall(method, request_id, caller, status);
}

// Acknowledgements and cancels may cross the end of their request, so those are only counted.
grpc::ServerUnaryReactor* ResumptionService::Answer(const char* method,
                                                    const std::string& request_id,
                                                    grpc::CallbackServerContext* context,
                                                    const absl::Status& status) const {
  if (!status.ok() && CauseOf(status) == RefusalCause::kOver) {
    metrics_.CountRefusal(status);
  } else if (!status.ok()) {
    NoteRefused(method, request_id, *context, status);
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(wire::ToGrpc(status));
  return reactor;
}

Stream* ResumptionService::Resume(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request_bytes) {
  v1::ResumeRequest request;
  grpc::ByteBuffer copy(*request_bytes);  // shares the slices; decoding consumes a buffer
  const auto refuse = [&](const absl::Status& status) {
    NoteRefused("Resume", request.request_id(), *context, status);
    return RefuseStream(status);
  };
  if (!grpc::SerializationTraits<v1::ResumeRequest>::Deserialize(&copy, &request).ok()) {
    return refuse(absl::InvalidArgumentError("the request is not a valid ResumeRequest"));
  }
  auto job = Find(request);
  if (!job.ok()) return refuse(job.status());
  // A request that has ended well is over for its caller, who has said so.
  if ((*job)->ended()) {
    const absl::Status end = (*job)->ending().status;
    return refuse(
        Over(end.ok() ? absl::NotFoundError("request_id: its caller has everything") : end));
  }
  const auto queue = (*job)->delivery().any_lane(request.lane());
  if (!queue.ok()) return refuse(queue.status());
  // A call that is refused changes nothing for the stream before it, so this comes first.
  const absl::Status resumable = (*queue)->CheckResumable(request.received());
  if (!resumable.ok()) return refuse(resumable);

  const wire::Connections* connections = connections_;
  auto stream = std::make_unique<ServerStream>(
      context, *queue, connections == nullptr ? nullptr : connections->Find(context->peer()),
      ServerStream::Events{
          .on_cancel = [] {},  // the queue waits for the next stream
          .on_end =
              [job = *job, lane = request.lane()](const absl::Status& status) {
                if (status.ok() && lane > 0) job->delivery().OnSideLaneDone(lane);
              },
          .on_done =
              [job = *job, lane = request.lane(), peer = context->peer(), began = absl::Now(),
               received = request.received()](const absl::Status& status) {
                LogLane(*job, lane, peer, began, static_cast<int64_t>(received), status);
              }});
  // Tells the consumer that the lane is attached, because its first frame may be long in coming.
  stream->StartSendInitialMetadata();
  std::optional<Message> greeting;
  if (request.lane() == 0) greeting = AcceptedEvent((*job)->work(), /*queue_position=*/0);
  // Whoever resumes may be another process than the one that has attached the memory. If it is the
  // same, it says so once more over its socket. Others may have set or cleared this meanwhile, so
  // it stays cleared should the queue have become another since it was asked: whoever reads in
  // place can read payloads too.
  (*job)->credit()->set_is_read_in_place(false);
  const auto again = (*queue)->Resume(stream.get(), request.received(), std::move(greeting));
  if (!again.ok()) return refuse(again.status());
  metrics_.resumption().CountResumed(*again);
  process::LogEvent(process::LogLevel::kInfo, "stream_resumed",
                    {{"id", (*job)->work().id},
                     {"receiver", int64_t{(*job)->work().receiver}},
                     {"lane", int64_t{request.lane()}},
                     {"received", static_cast<int64_t>(request.received())},
                     {"frames_again", *again},
                     {"trace_id", (*job)->work().caller.trace.trace_id}});
  return stream.release();  // owns itself from here on
}

absl::Status ResumptionService::Take(const v1::AcknowledgeRequest& request) {
  PREFILLD_ASSIGN_OR_RETURN(const std::shared_ptr<PrefillJob> job, Find(request));
  if (request.lanes_size() > job->work().num_lanes) {
    return absl::InvalidArgumentError(absl::StrCat("lanes has ", request.lanes_size(),
                                                   " receipts; the request has ",
                                                   job->work().num_lanes, " lanes"));
  }
  for (const v1::LaneReceipt& receipt : request.lanes()) {
    if (receipt.damaged_size() > kMaxDamaged) {
      return absl::InvalidArgumentError(
          absl::StrCat("damaged has ", receipt.damaged_size(), " frames; at most ", kMaxDamaged));
    }
    const auto again = job->delivery().Acknowledge(receipt);
    if (absl::IsAborted(again.status())) job->Abort(Outcome::kDamaged, again.status());
    PREFILLD_RETURN_IF_ERROR(again.status());
    if (*again > 0) metrics_.resumption().CountDamaged(*again);
  }
  if (!request.complete()) return absl::OkStatus();
  return Because(RefusalCause::kInvalid, job->Complete());
}

grpc::ServerUnaryReactor* ResumptionService::Acknowledge(grpc::CallbackServerContext* context,
                                                         const v1::AcknowledgeRequest* request,
                                                         v1::AcknowledgeResponse*) {
  return Answer("Acknowledge", request->request_id(), context, Take(*request));
}

grpc::ServerUnaryReactor* ResumptionService::Cancel(grpc::CallbackServerContext* context,
                                                    const v1::CancelRequest* request,
                                                    v1::CancelResponse*) {
  const auto job = Find(*request);
  if (job.ok()) (*job)->OnCallCancelled();  // unless it has ended
  return Answer("Cancel", request->request_id(), context, job.status());
}

}  // namespace prefilld::server
