#include "server/resumption_service.h"

#include <utility>

#include <grpcpp/impl/codegen/proto_utils.h>

#include "absl/strings/str_cat.h"
#include "proto/process/log.h"
#include "proto/status_macros.h"
#include "proto/wire/connections.h"
#include "proto/wire/grpc_status.h"
#include "server/prefill_job.h"
#include "server/resumption_metrics.h"
#include "server/scheduler.h"
#include "server/server_stream.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

using Stream = grpc::ServerWriteReactor<grpc::ByteBuffer>;

// The search for each takes time in proportion to the frames that a request may hold.
constexpr int kMaxDamaged = 64;

grpc::ServerUnaryReactor* Answer(grpc::CallbackServerContext* context, const absl::Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(wire::ToGrpc(status));
  return reactor;
}

}  // namespace

ResumptionService::ResumptionService(Scheduler& scheduler, ResumptionMetrics& metrics,
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
    return absl::NotFoundError("request_id: no such resumable request runs");
  }
  if (!IsSameKey(message.resume_key(), job->work().resume_key)) {
    return absl::PermissionDeniedError("resume_key: not the one of this request");
  }
  return job;
}

Stream* ResumptionService::Resume(grpc::CallbackServerContext* context,
                                  const grpc::ByteBuffer* request_bytes) {
  v1::ResumeRequest request;
  grpc::ByteBuffer copy(*request_bytes);  // shares the slices; decoding consumes a buffer
  if (!grpc::SerializationTraits<v1::ResumeRequest>::Deserialize(&copy, &request).ok()) {
    return RefuseStream(absl::InvalidArgumentError("the request is not a valid ResumeRequest"));
  }
  auto job = Find(request);
  if (!job.ok()) return RefuseStream(job.status());
  // A request that has ended well is over for its caller, who has said so.
  if ((*job)->ended()) {
    const absl::Status end = (*job)->ending().status;
    return RefuseStream(end.ok() ? absl::NotFoundError("request_id: its caller has everything")
                                 : end);
  }
  const auto queue = (*job)->delivery().any_lane(request.lane());
  if (!queue.ok()) return RefuseStream(queue.status());

  const wire::Connections* connections = connections_;
  auto stream = std::make_unique<ServerStream>(
      context, *queue, connections == nullptr ? nullptr : connections->Find(context->peer()),
      ServerStream::Events{.on_cancel = [] {},  // the queue waits for the next stream
                           .on_end =
                               [job = *job, lane = request.lane()](const absl::Status& status) {
                                 if (status.ok() && lane > 0) job->delivery().OnSideLaneDone(lane);
                               }});
  // Tells the consumer that the lane is attached, because its first frame may be long in coming.
  stream->StartSendInitialMetadata();
  std::optional<Message> greeting;
  if (request.lane() == 0) greeting = AcceptedEvent((*job)->work(), /*queue_position=*/0);
  const auto again = (*queue)->Resume(stream.get(), request.received(), std::move(greeting));
  if (!again.ok()) return RefuseStream(again.status());
  metrics_.CountResumed(*again);
  process::LogEvent(process::LogLevel::kInfo, "stream_resumed",
                    {{"id", (*job)->work().id},
                     {"receiver", int64_t{(*job)->work().receiver}},
                     {"lane", int64_t{request.lane()}},
                     {"received", static_cast<int64_t>(request.received())},
                     {"frames_again", *again}});
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
    PREFILLD_ASSIGN_OR_RETURN(const int64_t again, job->delivery().Acknowledge(receipt));
    if (again > 0) metrics_.CountDamaged(again);
  }
  return request.complete() ? job->Complete() : absl::OkStatus();
}

grpc::ServerUnaryReactor* ResumptionService::Acknowledge(grpc::CallbackServerContext* context,
                                                         const v1::AcknowledgeRequest* request,
                                                         v1::AcknowledgeResponse*) {
  return Answer(context, Take(*request));
}

grpc::ServerUnaryReactor* ResumptionService::Cancel(grpc::CallbackServerContext* context,
                                                    const v1::CancelRequest* request,
                                                    v1::CancelResponse*) {
  const auto job = Find(*request);
  if (!job.ok()) return Answer(context, job.status());
  (*job)->OnCallCancelled();  // unless it has ended
  return Answer(context, absl::OkStatus());
}

}  // namespace prefilld::server
