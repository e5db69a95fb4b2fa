// The time that a request may take to arrive.
//
// gRPC hands a method with one request the whole message, and waits for it for as long as the
// connection lives. So a stranger who sends requests in part keeps their memory and their streams
// for ever, unless somebody watches the calls that have begun and are not here yet.
#ifndef PREFILLD_PROTO_WIRE_ARRIVALS_H_
#define PREFILLD_PROTO_WIRE_ARRIVALS_H_

#include <cstdint>
#include <memory>

#include <grpc/grpc.h>
#include <grpcpp/impl/rpc_service_method.h>
#include <grpcpp/support/server_interceptor.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace prefilld::wire {

// Knows the calls of a server whose request is on its way, and ends those that take too long with
// DEADLINE_EXCEEDED. Thread-safe.
class Arrivals {
 public:
  struct Counts {
    int64_t open = 0;  // calls that have begun and whose request is not here
    int64_t late = 0;  // calls ended by EndLate, so far
  };

  // The limit of a server whose streams may stall for so long.
  static absl::Duration LimitFor(absl::Duration stall_timeout);

  explicit Arrivals(absl::Duration limit) : limit_(limit) {}

  // Makes a handler that reads the request itself and then lets `handler` go on, which is one of
  // gRPC's for callback methods with one request. The method must be registered as bidirectional,
  // so that gRPC calls it when the headers are here; on the wire that is the same. This must
  // outlive the server.
  std::unique_ptr<grpc::internal::MethodHandler> Watch(
      std::unique_ptr<grpc::internal::MethodHandler> handler);

  // Makes a factory that bounds a whole call of gRPC's reflection service, which takes a thread,
  // by the same limit. This must outlive the server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> WatchReflection();

  // Ends the calls that have been on their way for longer than the limit.
  void EndLate(absl::Time now);
  Counts counts() const;

  // For those who read a request: the call is on its way from Begin, which returns a number for
  // it above 0, to End. EndLate uses the call between the two, so it must live.
  int64_t Begin(grpc_call* call);
  void End(int64_t number);

 private:
  struct Entry {
    grpc_call* call = nullptr;
    absl::Time until;
    bool ended = false;
  };

  const absl::Duration limit_;
  mutable absl::Mutex mu_;
  absl::btree_map<int64_t, Entry> open_ ABSL_GUARDED_BY(mu_);  // by number, the oldest first
  int64_t last_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t late_ ABSL_GUARDED_BY(mu_) = 0;
};

// A service whose methods have one request each that may take a limited time to arrive.
template <typename Service>
class WithArrivals : public Service {
 protected:
  // Replaces the handler of the method at `index` of the service's definition.
  void WatchArrival(Arrivals& arrivals, int index, grpc::internal::MethodHandler* handler) {
    // The first of these makes the method bidirectional; the second one says who handles it.
    this->MarkMethodStreamed(index, nullptr);
    this->MarkMethodRawCallback(
        index, arrivals.Watch(std::unique_ptr<grpc::internal::MethodHandler>(handler)).release());
  }
};

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_ARRIVALS_H_
