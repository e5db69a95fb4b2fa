// One Prefill or AttachReceiver call that blocks.
#ifndef PREFILLD_CLIENT_PREFILL_CALL_H_
#define PREFILLD_CLIENT_PREFILL_CALL_H_

#include <cstdint>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/acknowledger.h"
#include "client/prefill_client.h"
#include "client/raw_stream.h"
#include "client/reception.h"
#include "client/shared_memory_pool.h"
#include "google/protobuf/message_lite.h"
#include "prefill/v1/prefill.pb.h"
#include "proto/wire/lane_patience.h"

namespace prefilld::client {

// The calling thread reads lane 0, which carries everything except frames of other lanes. Each
// further lane has a thread that lives from Accepted to the end of its stream. If the request is
// resumable, each of these threads attaches its own lane again when the stream breaks.
class PrefillCall {
 public:
  // `method` is the path of the call, whose request is a PrefillRequest or an
  // AttachReceiverRequest. Everything but `calls` is borrowed. A lane has a channel of its own.
  // `memories` has shared memory of the server that the channels lead to.
  template <typename Request>
  PrefillCall(const char* method, const Request& request, KvSink& sink,
              const PrefillCallOptions& options,
              const std::vector<std::shared_ptr<grpc::Channel>>& channels,
              SharedMemoryPool& memories, std::shared_ptr<SmallCalls> calls)
      : PrefillCall(
            method, request, {request.request_id(), request.resume_key(), ReceiverOf(request)},
            options, channels, memories, std::move(calls),
            std::make_unique<Reception>(request, sink, static_cast<uint32_t>(channels.size()))) {}

  // Makes the call and returns its end. May be called once.
  absl::StatusOr<::prefill::v1::PrefillResult> Run();

  // Returns how the server took the request, null if it did not. May be called when Run has
  // returned.
  const ::prefill::v1::Accepted* accepted() const {
    return reception_->accepted() ? &*reception_->accepted() : nullptr;
  }

  // Ends every lane, and keeps the first reason. Thread-safe.
  void Fail(absl::Status reason);

 private:
  PrefillCall(const char* method, const google::protobuf::MessageLite& request,
              ResumableRequest names, const PrefillCallOptions& options,
              std::vector<std::shared_ptr<grpc::Channel>> channels, SharedMemoryPool& memories,
              std::shared_ptr<SmallCalls> calls, std::unique_ptr<Reception> reception);

  static uint32_t ReceiverOf(const ::prefill::v1::PrefillRequest&) { return 0; }
  static uint32_t ReceiverOf(const ::prefill::v1::AttachReceiverRequest& request) {
    return request.receiver();
  }

  // A lane's stream begins with this.
  struct Opening {
    const char* method;
    const google::protobuf::MessageLite& request;
    const Metadata& metadata;
    bool resumes = false;  // in place of a stream that broke
  };

  absl::Status status();
  void ReadLane(uint32_t lane, const Opening& first);
  absl::Status ReadStream(uint32_t lane, const Opening& opening);
  bool ReadOn(uint32_t lane, const Opening& first, wire::LanePatience& patience,
              absl::Status& ended);
  bool IsResumable() const;  // or may be, as long as the server has not said
  bool MayResume() const;
  void OnAccepted();
  void ReadOtherLanes();

  const Opening call_;
  const ResumableRequest names_;
  const absl::Time deadline_;
  const std::vector<std::shared_ptr<grpc::Channel>> channels_;  // by lane
  const std::shared_ptr<Acknowledger> acknowledger_;            // null: it was not asked for
  const std::unique_ptr<Reception> reception_;
  SharedMemoryPool* const memories_;  // null: shared memory is not wanted
  bool was_accepted_ = false;         // by the stream of lane 0; its thread alone uses it
  std::vector<std::thread> lane_threads_;

  absl::Mutex mu_;
  absl::Status status_ ABSL_GUARDED_BY(mu_);
  std::vector<std::unique_ptr<RawStream>> streams_ ABSL_GUARDED_BY(mu_);  // by lane; the latest
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_PREFILL_CALL_H_
