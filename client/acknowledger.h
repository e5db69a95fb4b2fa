// Tells the server of a resumable request what has arrived.
#ifndef PREFILLD_CLIENT_ACKNOWLEDGER_H_
#define PREFILLD_CLIENT_ACKNOWLEDGER_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "grpcpp/alarm.h"
#include "prefill/v1/resumption.pb.h"

namespace grpc {
class Channel;
}

namespace prefilld::client {

// Counts the small calls of a client for which no thread waits. The calls own it together with the
// client, and each leaves it when its share of the channel is gone. So a client that has waited is
// the last to use gRPC, which must not be shut down on one of gRPC's own threads. Thread-safe.
class SmallCalls {
 public:
  void Begin();
  void End();
  void AwaitIdle();

 private:
  absl::Mutex mu_;
  int open_ ABSL_GUARDED_BY(mu_) = 0;
};

// The names by which the server knows a resumable request, and who receives it.
struct ResumableRequest {
  std::string id;
  std::string resume_key;
  uint32_t receiver = 0;
};

// One Acknowledge is under way at a time, and the next tells all that has come meanwhile. A call
// that fails with the connection is made again after a moment. Nobody waits for any of it: the call
// under way owns this together with whoever reads the streams. Thread-safe.
class Acknowledger : public std::enable_shared_from_this<Acknowledger> {
 public:
  Acknowledger(std::shared_ptr<SmallCalls> calls, std::shared_ptr<grpc::Channel> channel,
               ResumableRequest request);

  // Every frame of the lane before `received` is stored, and frame `damaged`, if there is one, is
  // asked for once more.
  void Note(uint32_t lane, uint64_t received, std::optional<uint64_t> damaged = std::nullopt);
  // These end it: the result is here too, or the request is no longer wanted.
  void Complete();
  void Cancel();

 private:
  template <typename Request, typename Response>
  class SmallCall;

  void SendIfDue();
  void SendLater() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Close();
  void OnAnswer(const ::prefill::v1::AcknowledgeRequest& sent, const absl::Status& status);
  // Returns what is to be told, and remembers that it was.
  std::optional<::prefill::v1::AcknowledgeRequest> TakeNews();

  const std::shared_ptr<SmallCalls> calls_;
  const std::shared_ptr<grpc::Channel> channel_;
  const ResumableRequest request_;

  absl::Mutex mu_;
  std::map<uint32_t, ::prefill::v1::LaneReceipt> news_ ABSL_GUARDED_BY(mu_);  // by lane
  bool under_way_ ABSL_GUARDED_BY(mu_) = false;  // a call, or the moment before it is made again
  // A new one for each moment, because the one before may still be going off. Null: there was none.
  std::unique_ptr<grpc::Alarm> moment_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace prefilld::client

#endif  // PREFILLD_CLIENT_ACKNOWLEDGER_H_
