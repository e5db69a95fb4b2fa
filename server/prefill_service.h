// The gRPC service prefill.v1.PrefillService: it decodes and validates requests, and hands jobs to
// the scheduler.
#ifndef PREFILLD_SERVER_PREFILL_SERVICE_H_
#define PREFILLD_SERVER_PREFILL_SERVICE_H_

#include <atomic>
#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "prefill/v1/prefill.grpc.pb.h"
#include "proto/wire/arrivals.h"
#include "server/clock.h"
#include "server/prefill_work.h"
#include "server/resumable_jobs.h"
#include "server/tenant_identity.h"
#include "server/waiting_receivers.h"

namespace prefilld::wire {
class Connection;
class Connections;
}  // namespace prefilld::wire

namespace prefilld::server {

class CacheWatch;
class Metrics;
class PrefillJob;
class PushDialer;
class Scheduler;
class ServerStream;
class StagingRing;
class TenantDirectory;

// The streams carry messages that are encoded by hand (proto/wire/frame_codec.h), so those methods
// take raw buffers.
using PrefillServiceBase =
    wire::WithArrivals<::prefill::v1::PrefillService::WithRawCallbackMethod_Prefill<
        ::prefill::v1::PrefillService::WithRawCallbackMethod_AttachLane<
            ::prefill::v1::PrefillService::WithRawCallbackMethod_AttachReceiver<
                ::prefill::v1::PrefillService::WithCallbackMethod_GetServerInfo<
                    ::prefill::v1::PrefillService::WithCallbackMethod_WatchPrefixCache<
                        ::prefill::v1::PrefillService::Service>>>>>>;

// Thread-safe, as gRPC calls it.
class PrefillService final : public PrefillServiceBase {
 public:
  // All references are borrowed. `arrivals` bounds the time that a request may take to arrive.
  // `info` holds everything about the server that does not change. Requests that wait for their
  // consumers hold a part of `ring`.
  PrefillService(Scheduler& scheduler, PushDialer& push_dialer, Metrics& metrics,
                 const Clock& clock, RequestLimits limits, TenantEvidence tenant_evidence,
                 const TenantDirectory& tenants, CacheWatch& cache_watch, wire::Arrivals& arrivals,
                 ::prefill::v1::ServerInfo info, const StagingRing& ring);

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Prefill(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* AttachLane(grpc::CallbackServerContext* context,
                                                         const grpc::ByteBuffer* request) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* AttachReceiver(
      grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* GetServerInfo(grpc::CallbackServerContext* context,
                                          const ::prefill::v1::GetServerInfoRequest* request,
                                          ::prefill::v1::ServerInfo* response) override;
  grpc::ServerWriteReactor<::prefill::v1::PrefixCacheUpdate>* WatchPrefixCache(
      grpc::CallbackServerContext* context,
      const ::prefill::v1::WatchPrefixCacheRequest* request) override;

  // Tries the requests again whose id was taken, and the receivers whose request was not there, and
  // ends the lives of resumable requests that have ended.
  // Must be called every few milliseconds, by one thread, until the last call has ended.
  void RetryWaiting();

  // Lets streams see how much their connections take. The streams of calls that came before this
  // never do.
  void SetConnections(const wire::Connections* connections) { connections_ = connections; }

 private:
  // A request whose id is taken, perhaps by one of the same caller whose cancel is still on its
  // way. Nobody's id is taken away from them: it waits for a moment, and is refused then.
  struct Waiting {
    std::shared_ptr<PrefillJob> job;
    ServerStream* stream;  // not attached yet
    absl::Time until;
  };

  // Holds what is known of a call before its request is looked at.
  struct Arrived {
    Caller caller;
    size_t position = 0;                       // of the tenant
    absl::StatusOr<Tenant> tenant = Tenant();  // as it is now
  };

  // Also names the call's span in the answer.
  Arrived Arrive(grpc::CallbackServerContext& context) const;
  absl::Status Submit(const std::shared_ptr<PrefillJob>& job);
  void OnCallDone(PrefillJob& job);
  void OnReceiverDone(PrefillJob& receiver);
  void RetireRequest(PrefillJob& job);
  void RetireReceiver(PrefillJob& receiver);
  // Makes a job of a request, and of each further receiver that is called, which joins it.
  std::shared_ptr<PrefillJob> NewJob(PrefillWork work);
  void RetryNames();
  void AwaitName(Waiting waiting, const absl::Status& taken);
  std::shared_ptr<const wire::Connection> ConnectionOf(
      const grpc::CallbackServerContext& context) const;
  // Says whose request it is, and lowers its class, and lanes that the server chose, to what this
  // tenant may have.
  static void AssignTenant(const Arrived& arrived, PrefillWork& work);
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Refuse(const std::string& request_id,
                                                     const Arrived& arrived,
                                                     const absl::Status& status);
  // Counts a refused call that is no request, and logs it.
  void NoteRefused(const char* method, const std::string& request_id, const Caller& caller,
                   const absl::Status& status) const;

  Scheduler& scheduler_;
  PushDialer& push_dialer_;
  Metrics& metrics_;
  const Clock& clock_;
  const RequestLimits limits_;
  const TenantEvidence tenant_evidence_;
  const TenantDirectory& tenants_;
  CacheWatch& cache_watch_;
  const ::prefill::v1::ServerInfo info_;
  std::atomic<const wire::Connections*> connections_ = nullptr;
  ResumableJobs resumable_;
  WaitingReceivers receivers_;

  absl::Mutex mu_;
  std::vector<Waiting> waiting_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_PREFILL_SERVICE_H_
