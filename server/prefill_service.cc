#include "server/prefill_service.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include <grpcpp/impl/codegen/proto_utils.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/connections.h"
#include "proto/wire/grpc_status.h"
#include "server/cache_watch.h"
#include "server/metrics.h"
#include "server/prefill_job.h"
#include "server/push_dialer.h"
#include "server/request_log.h"
#include "server/scheduler.h"
#include "server/server_stream.h"
#include "server/tenant_directory.h"
#include "server/tenant_rules.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

using Stream = grpc::ServerWriteReactor<grpc::ByteBuffer>;

// A caller's cancel and its next request travel together, but are heard of in any order.
constexpr absl::Duration kNameWait = absl::Seconds(1);
constexpr size_t kMaxWaitingForAName = 64;  // for a name; more are refused at once

template <typename Message>
absl::StatusOr<Message> Decode(const grpc::ByteBuffer& buffer) {
  Message message;
  grpc::ByteBuffer copy(buffer);  // shares the slices; decoding consumes a buffer
  if (!grpc::SerializationTraits<Message>::Deserialize(&copy, &message).ok()) {
    return absl::InvalidArgumentError(
        absl::StrCat("the request is not a valid ", Message::descriptor()->full_name()));
  }
  return message;
}

// Converts the deadline to our clock. On the wire it is a time-out, which gRPC adds to the system's
// clock.
absl::Time DeadlineOf(const grpc::CallbackServerContext& context, const Clock& clock) {
  const auto deadline = context.deadline();
  if (deadline == std::chrono::system_clock::time_point::max()) return absl::InfiniteFuture();
  return clock.Now() + (absl::FromChrono(deadline) - absl::Now());
}

Outcome OutcomeOfRefusal(absl::StatusCode code) {
  switch (code) {
    case absl::StatusCode::kAlreadyExists:
      return Outcome::kDuplicate;
    case absl::StatusCode::kResourceExhausted:
      return Outcome::kQueueFull;
    case absl::StatusCode::kUnauthenticated:
      return Outcome::kUnauthenticated;
    case absl::StatusCode::kUnavailable:
      return Outcome::kUnavailable;
    case absl::StatusCode::kDeadlineExceeded:
      return Outcome::kDeadline;
    default:
      return Outcome::kInvalid;
  }
}

}  // namespace

PrefillService::PrefillService(Scheduler& scheduler, PushDialer& push_dialer, Metrics& metrics,
                               const Clock& clock, RequestLimits limits,
                               TenantEvidence tenant_evidence, const TenantDirectory& tenants,
                               CacheWatch& cache_watch, wire::Arrivals& arrivals,
                               v1::ServerInfo info, const StagingRing& ring)
    : scheduler_(scheduler),
      push_dialer_(push_dialer),
      metrics_(metrics),
      clock_(clock),
      limits_(std::move(limits)),
      tenant_evidence_(std::move(tenant_evidence)),
      tenants_(tenants),
      cache_watch_(cache_watch),
      info_(std::move(info)),
      resumable_(metrics.resumption(), clock, ring,
                 [this](PrefillJob& job) {
                   job.work().receiver == 0 ? RetireRequest(job) : RetireReceiver(job);
                 }),
      receivers_(scheduler, resumable_, clock) {
  using grpc::CallbackServerContext;
  using Streaming =
      grpc::internal::CallbackServerStreamingHandler<grpc::ByteBuffer, grpc::ByteBuffer>;
  using Unary = grpc::internal::CallbackUnaryHandler<v1::GetServerInfoRequest, v1::ServerInfo>;
  WatchArrival(arrivals, 0,
               new Streaming([this](CallbackServerContext* context, const grpc::ByteBuffer* bytes) {
                 return Prefill(context, bytes);
               }));
  WatchArrival(arrivals, 1,
               new Streaming([this](CallbackServerContext* context, const grpc::ByteBuffer* bytes) {
                 return AttachLane(context, bytes);
               }));
  WatchArrival(arrivals, 2,
               new Streaming([this](CallbackServerContext* context, const grpc::ByteBuffer* bytes) {
                 return AttachReceiver(context, bytes);
               }));
  WatchArrival(arrivals, 3,
               new Unary([this](CallbackServerContext* context,
                                const v1::GetServerInfoRequest* request, v1::ServerInfo* response) {
                 return GetServerInfo(context, request, response);
               }));
  using Watching = grpc::internal::CallbackServerStreamingHandler<v1::WatchPrefixCacheRequest,
                                                                  v1::PrefixCacheUpdate>;
  WatchArrival(arrivals, 4,
               new Watching([this](CallbackServerContext* context,
                                   const v1::WatchPrefixCacheRequest* request) {
                 return WatchPrefixCache(context, request);
               }));
}

PrefillService::Arrived PrefillService::Arrive(grpc::CallbackServerContext& context) const {
  bool trace_ignored = false;
  Arrived arrived{.caller = CallerOf(context, &trace_ignored)};
  if (trace_ignored) metrics_.CountIgnoredTrace();
  const std::shared_ptr<const Tenants> table = tenants_.current();
  const auto position = TenantOf(tenant_evidence_, *table, context);
  if (position.ok()) {
    arrived.position = *position;
    arrived.tenant = table->all()[*position];
    if (tenant_evidence_.source != TenantSource::kNone) {
      arrived.caller.tenant = arrived.tenant->name;
    }
  } else {
    arrived.tenant = position.status();
  }
  context.AddTrailingMetadata(wire::kTraceResponseKey, arrived.caller.trace.traceparent());
  return arrived;
}

Stream* PrefillService::Prefill(grpc::CallbackServerContext* context,
                                const grpc::ByteBuffer* request_bytes) {
  const Arrived arrived = Arrive(*context);
  const auto request = Decode<v1::PrefillRequest>(*request_bytes);
  if (!request.ok()) return Refuse("", arrived, request.status());
  std::string id = request->request_id();
  const auto refuse = [&](const absl::Status& status) {
    receivers_.OnRefused(id, request->receiver_key(), OutcomeOfRefusal(status.code()), status);
    return Refuse(id, arrived, status);
  };
  if (!arrived.tenant.ok()) return refuse(arrived.tenant.status());
  auto work = ValidateRequest(*request, limits_);
  if (!work.ok()) return refuse(work.status());
  id = work->id;
  if (const absl::Status may = CheckTenantRules(*arrived.tenant, *work); !may.ok()) {
    metrics_.tenants().CountRefused(arrived.position);
    return refuse(may);
  }
  work->deadline = DeadlineOf(*context, clock_);
  AssignTenant(arrived, *work);
  if (clock_.Now() >= work->deadline) {
    return refuse(absl::DeadlineExceededError("the deadline has passed"));
  }

  auto job = NewJob(*std::move(work));
  const absl::Status admitted = Submit(job);
  if (!admitted.ok() && !absl::IsAlreadyExists(admitted)) {
    metrics_.tenants().CountRefused(arrived.position);
    return refuse(admitted);
  }
  auto* stream = new ServerStream(context, &job->delivery().control(), ConnectionOf(*context),
                                  {.on_cancel = [job] { job->OnCallCancelled(); },
                                   .on_end =
                                       [job](const absl::Status& status) {
                                         if (status.ok() && !job->work().resumable()) {
                                           job->OnResultSent();
                                         }
                                       },
                                   .on_done = [this, job](const auto&) { OnCallDone(*job); }});
  if (admitted.ok()) {
    AttachFirst(job->delivery().control(), stream);
    if (job->work().num_receivers > 1) receivers_.Retry();
  } else {
    AwaitName({.job = std::move(job), .stream = stream, .until = clock_.Now() + kNameWait},
              admitted);
  }
  return stream;
}

std::shared_ptr<PrefillJob> PrefillService::NewJob(PrefillWork work) {
  std::vector<PrefillWork> pushes = std::exchange(work.further_pushes, {});
  auto job = std::make_shared<PrefillJob>(
      std::move(work), clock_,
      [this](std::shared_ptr<PrefillJob> self) { push_dialer_.Start(std::move(self)); });
  for (PrefillWork& push : pushes) {
    push.deadline = job->work().deadline;
    push.caller = job->work().caller;
    push.tenant = job->work().tenant;
    const auto dial = [this](const std::shared_ptr<PrefillJob>& self) {
      push_dialer_.Start(self, [this, self] { OnReceiverDone(*self); });
    };
    const auto receiver = std::make_shared<PrefillJob>(std::move(push), clock_, dial);
    job->Join(receiver).IgnoreError();  // there is a place for each
  }
  return job;
}

absl::Status PrefillService::Submit(const std::shared_ptr<PrefillJob>& job) {
  const Scheduler::Admission admission = scheduler_.Submit(job);
  if (admission.status.ok() && job->work().resumable()) resumable_.Add(job);
  if (admission.status.ok() && job->work().pushes()) resumable_.AddPush(job);
  if (admission.status.ok() && !job->work().takes_kv) {
    for (const auto& receiver : job->others().jobs) {
      scheduler_.Adopt(receiver);
      resumable_.AddPush(receiver);
    }
  }
  return admission.retry_after.has_value()
             ? wire::WithRetryDelay(admission.status, *admission.retry_after)
             : admission.status;
}

void PrefillService::OnCallDone(PrefillJob& job) {
  if (job.outlives_call()) return;
  job.OnCallCancelled();  // unless it has ended
  RetireRequest(job);
}

void PrefillService::RetireRequest(PrefillJob& job) {
  const absl::Time now = clock_.Now();
  if (!scheduler_.Knows(job)) {
    const Ending ending = job.ending();
    metrics_.tenants().CountRefused(job.work().tenant);
    metrics_.CountRefused(ending.outcome, ending.status);
    return LogRefused(job.work().id, job.work().caller, ending.outcome, ending.status);
  }
  metrics_.CountRequest(job, now);
  LogRequest(job, now);
  scheduler_.Retire(job);
  // Receivers that were never called have no other end.
  if (job.work().takes_kv) return;
  for (const auto& receiver : job.others().jobs) {
    if (receiver->ended()) OnReceiverDone(*receiver);
  }
}

void PrefillService::AwaitName(Waiting waiting, const absl::Status& taken) {
  {
    absl::MutexLock lock(&mu_);
    if (waiting_.size() < kMaxWaitingForAName) {
      waiting_.push_back(std::move(waiting));
      return;
    }
  }
  waiting.job->Abort(Outcome::kDuplicate, taken);
  waiting.job->delivery().control().Attach(waiting.stream);
}

void PrefillService::RetryWaiting() {
  RetryNames();
  receivers_.Retry();
  resumable_.LookAround();
}

// A stream that is attached may end, and be gone, at once.
void PrefillService::RetryNames() {
  std::vector<Waiting> waiting;
  {
    absl::MutexLock lock(&mu_);
    waiting.swap(waiting_);
  }
  std::vector<Waiting> still;
  for (Waiting& entry : waiting) {
    const absl::Status admitted = entry.job->ended() ? absl::OkStatus() : Submit(entry.job);
    if (absl::IsAlreadyExists(admitted) && clock_.Now() < entry.until) {
      still.push_back(std::move(entry));
      continue;
    }
    if (!admitted.ok()) {
      const Outcome outcome = OutcomeOfRefusal(admitted.code());
      receivers_.OnRefused(entry.job->work().id, entry.job->work().receiver_key, outcome, admitted);
      entry.job->Abort(outcome, admitted);
    }
    AttachFirst(entry.job->delivery().control(), entry.stream);
  }
  absl::MutexLock lock(&mu_);
  waiting_.insert(waiting_.end(), still.begin(), still.end());
}

void PrefillService::AssignTenant(const Arrived& arrived, PrefillWork& work) {
  work.caller = arrived.caller;
  work.tenant = static_cast<int>(arrived.position);
  // No line break is in a salt, so the tenants' salts cannot meet.
  if (!work.caller.tenant.empty()) {
    work.cache_salt = absl::StrCat(work.caller.tenant, "\n", work.cache_salt);
  }
  work.priority = std::min(work.priority, arrived.tenant->max_priority);
  LowerChosenLanes(*arrived.tenant, work);
}

Stream* PrefillService::AttachLane(grpc::CallbackServerContext* context,
                                   const grpc::ByteBuffer* request_bytes) {
  const auto request = Decode<v1::AttachLaneRequest>(*request_bytes);
  const auto refuse = [&](const absl::Status& status) {
    NoteRefused("AttachLane", request.ok() ? request->request_id() : "", Arrive(*context).caller,
                status);
    return RefuseStream(status);
  };
  if (!request.ok()) return refuse(request.status());
  const std::shared_ptr<PrefillJob> job =
      scheduler_.Find(request->request_id(), request->receiver());
  if (job == nullptr || job->work().pushes()) {
    return refuse(absl::NotFoundError("request_id: no such running request with lanes"));
  }
  if (!IsSameKey(request->lane_key(), job->work().lane_key)) {
    return refuse(absl::PermissionDeniedError("lane_key: not the one of this request's Accepted"));
  }
  const auto queue = job->delivery().side_lane(request->lane());
  if (!queue.ok()) return refuse(queue.status());
  auto stream = std::make_unique<ServerStream>(
      context, *queue, ConnectionOf(*context),
      ServerStream::Events{.on_cancel = [job] { job->OnCallCancelled(); },
                           .on_end =
                               [job, lane = request->lane()](const absl::Status& status) {
                                 if (status.ok()) {
                                   job->delivery().OnSideLaneDone(lane);
                                 } else if (!job->work().resumable()) {
                                   job->OnCallCancelled();  // unless it has ended
                                 }
                               },
                           .on_done =
                               [job, lane = request->lane(), peer = context->peer(),
                                began = absl::Now()](const absl::Status& status) {
                                 LogLane(*job, lane, peer, began, std::nullopt, status);
                               }});
  // Tells the consumer that the lane is attached, because its first frame may be long in coming.
  stream->StartSendInitialMetadata();
  if (!(*queue)->Attach(stream.get())) {
    return refuse(
        absl::AlreadyExistsError(absl::StrCat("lane ", request->lane(), " is attached already")));
  }
  return stream.release();  // owns itself from here on
}

Stream* PrefillService::AttachReceiver(grpc::CallbackServerContext* context,
                                       const grpc::ByteBuffer* request_bytes) {
  const Arrived arrived = Arrive(*context);
  const auto request = Decode<v1::AttachReceiverRequest>(*request_bytes);
  auto work = !request.ok()          ? absl::StatusOr<PrefillWork>(request.status())
              : !arrived.tenant.ok() ? absl::StatusOr<PrefillWork>(arrived.tenant.status())
                                     : ValidateReceiver(*request, limits_);
  if (work.ok()) {
    if (absl::Status may = CheckTenantRules(*arrived.tenant, *work); !may.ok()) work = may;
  }
  if (!work.ok()) {
    const Outcome outcome = OutcomeOfRefusal(work.status().code());
    metrics_.CountReceiver(outcome);
    metrics_.CountRefusal(work.status());
    LogRefused(request.ok() ? request->request_id() : "", arrived.caller, outcome, work.status());
    return RefuseStream(work.status());
  }
  work->caller = arrived.caller;
  work->tenant = static_cast<int>(arrived.position);
  work->deadline = DeadlineOf(*context, clock_);
  auto receiver = std::make_shared<PrefillJob>(*std::move(work), clock_);
  auto* stream =
      new ServerStream(context, &receiver->delivery().control(), ConnectionOf(*context),
                       {.on_cancel = [receiver] { receiver->OnCallCancelled(); },
                        .on_end =
                            [receiver](const absl::Status& status) {
                              if (status.ok() && !receiver->work().resumable()) {
                                receiver->OnResultSent();
                              }
                            },
                        .on_done = [this, receiver](const auto&) { OnReceiverDone(*receiver); }});
  receivers_.Bring(std::move(receiver), stream);
  return stream;
}

void PrefillService::OnReceiverDone(PrefillJob& receiver) {
  if (receiver.outlives_call()) return;
  receiver.OnCallCancelled();  // unless it has ended
  RetireReceiver(receiver);
}

void PrefillService::RetireReceiver(PrefillJob& receiver) {
  const bool was_alive = scheduler_.Retire(receiver);
  // One that is called may end by its own call, and by that of its request.
  if (receiver.work().pushes() && !was_alive) return;
  const Ending ending = receiver.ending();
  metrics_.CountReceiver(ending.outcome);
  if (!was_alive && ending.outcome != Outcome::kCancelled) metrics_.CountRefusal(ending.status);
  LogReceiver(receiver, clock_.Now());
  scheduler_.Wake();
}

std::shared_ptr<const wire::Connection> PrefillService::ConnectionOf(
    const grpc::CallbackServerContext& context) const {
  const wire::Connections* connections = connections_;
  return connections == nullptr ? nullptr : connections->Find(context.peer());
}

grpc::ServerUnaryReactor* PrefillService::GetServerInfo(grpc::CallbackServerContext* context,
                                                        const v1::GetServerInfoRequest* request,
                                                        v1::ServerInfo* response) {
  const QueueState state = scheduler_.state();
  *response = info_;
  response->set_queued_requests(state.queued_requests);
  response->set_running_requests(state.running_requests);
  response->set_queued_tokens(state.queued_tokens);
  if (const model::PrefixCacheUse use = scheduler_.prefix_cache(); use.counts.num_slots > 0) {
    v1::PrefixCacheInfo& info = *response->mutable_prefix_cache();
    info.set_block_tokens(model::kPrefixBlockTokens);
    info.set_capacity_bytes(static_cast<uint64_t>(use.counts.num_slots * use.block_bytes));
    info.set_used_bytes(static_cast<uint64_t>(use.counts.used_slots * use.block_bytes));
  }
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerWriteReactor<v1::PrefixCacheUpdate>* PrefillService::WatchPrefixCache(
    grpc::CallbackServerContext* context, const v1::WatchPrefixCacheRequest* request) {
  const Arrived arrived = Arrive(*context);
  const auto identity = [this, context]() -> absl::StatusOr<std::string> {
    const std::shared_ptr<const Tenants> table = tenants_.current();
    PREFILLD_ASSIGN_OR_RETURN(const size_t tenant, TenantOf(tenant_evidence_, *table, *context));
    return table->all()[tenant].name;
  };
  return cache_watch_.Watch(context, arrived.caller, identity, *request,
                            [&](const absl::Status& status) {
                              NoteRefused("WatchPrefixCache", "", arrived.caller, status);
                            });
}

Stream* PrefillService::Refuse(const std::string& request_id, const Arrived& arrived,
                               const absl::Status& status) {
  const Outcome outcome = OutcomeOfRefusal(status.code());
  metrics_.CountRefused(outcome, status);
  LogRefused(request_id, arrived.caller, outcome, status);
  return RefuseStream(status);
}

void PrefillService::NoteRefused(const char* method, const std::string& request_id,
                                 const Caller& caller, const absl::Status& status) const {
  metrics_.CountRefusal(status);
  LogRefusedCall(method, request_id, caller, status);
}

}  // namespace prefilld::server
