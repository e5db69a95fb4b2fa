// The time that a request may take to arrive, and how many may arrive at once.
//
// gRPC hands a method with one request the whole message, and waits for it for as long as the
// connection lives. So a stranger who sends requests in part keeps their memory and their streams
// for ever, unless somebody watches the calls that have begun and are not here yet. gRPC's own
// quota of memory notices too late what fast senders do. What nobody reads stays with its sender
// but for the first 64 KiB, so the requests that are read at once bound the memory of all.
#ifndef PREFILLD_PROTO_WIRE_ARRIVALS_H_
#define PREFILLD_PROTO_WIRE_ARRIVALS_H_

#include <cstdint>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <grpc/grpc.h>
#include <grpcpp/impl/rpc_service_method.h>
#include <grpcpp/support/server_interceptor.h>

#include "absl/base/thread_annotations.h"
#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace prefilld::wire {

// Knows the calls of a server whose request is on its way, and ends those that take too long with
// DEADLINE_EXCEEDED. Where more calls have begun than may be read at once, the connection with the
// fewest that are read comes next, and calls that are read for longer than kPatience end with
// RESOURCE_EXHAUSTED, those first whose connection has the most. Thread-safe.
class Arrivals {
 public:
  static constexpr absl::Duration kPatience = absl::Seconds(1);

  struct Counts {
    int64_t open = 0;  // calls that have begun and whose request is not here
    int64_t late = 0;  // calls ended by EndLate, so far
    // Calls that ended otherwise before their request was here: it is too long for the server, the
    // caller has cancelled, or the connection is gone.
    int64_t broken_off = 0;
    // Calls that have begun and are not over, and how many of them the connection has that has the
    // most. gRPC does not tell Unix sockets apart, so theirs count as those of one.
    int64_t streams = 0;
    int64_t most_streams = 0;
  };

  // Counts a call among the streams while it lives.
  class Stream {
   public:
    Stream(Arrivals& arrivals, std::string peer);
    ~Stream();
    Stream(const Stream&) = delete;
    Stream& operator=(const Stream&) = delete;

   private:
    Arrivals& arrivals_;
    const std::string peer_;
  };

  // The limit of a server whose streams may stall for so long.
  static absl::Duration LimitFor(absl::Duration stall_timeout);

  explicit Arrivals(absl::Duration limit) : limit_(limit) {}

  // Sets how many requests are read at once, at least 1, before the server starts.
  void set_max_read_at_once(int64_t max) { max_read_at_once_ = max; }

  // Has `on_call` called with the peer, as grpc::ServerContext::peer() writes it, of each call that
  // begins. Must be set before the server starts.
  void set_on_call(std::function<void(absl::string_view peer)> on_call) {
    on_call_ = std::move(on_call);
  }
  // For services that read their requests themselves.
  void NoteCall(absl::string_view peer) const {
    if (on_call_ != nullptr) on_call_(peer);
  }

  // Makes a handler that reads the request itself and then lets `handler` go on, which is one of
  // gRPC's for callback methods with one request. The method must be registered as bidirectional,
  // so that gRPC calls it when the headers are here; on the wire that is the same. This must
  // outlive the server.
  std::unique_ptr<grpc::internal::MethodHandler> Watch(
      std::unique_ptr<grpc::internal::MethodHandler> handler);

  // Makes a factory that bounds a whole call of gRPC's reflection service, which takes a thread,
  // by the same limit. This must outlive the server.
  std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> WatchReflection();

  // Ends the calls that have been on their way for longer than the limit, and makes room for those
  // that wait to be read.
  void EndLate(absl::Time now);
  Counts counts() const;

  // For those who read a request: the call is on its way from Begin, which returns a number for
  // it above 0, to End. EndLate uses the call between the two, so it must live.
  int64_t Begin(grpc_call* call);
  void End(int64_t number, bool broken_off = false);
  // Calls `read` once, now or when it is the call's turn. A call that is ended meanwhile has its
  // turn at once. Read may call End.
  void Read(int64_t number, std::function<void()> read);

 private:
  using Reads = std::vector<std::function<void()>>;

  struct Entry {
    grpc_call* call = nullptr;
    std::string peer;
    absl::Time until;
    absl::Time read_since = absl::InfiniteFuture();
    std::function<void()> read;  // while it waits for its turn
    bool ended = false;
  };

  // The numbers of a connection's calls, the oldest first.
  struct Peer {
    absl::btree_set<int64_t> waiting, read;
  };

  // Returns what is to be called, without the lock, for the calls whose turn it is.
  Reads TakeTurns(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Leave(int64_t number, const Entry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MakeRoom(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Returns the call that is to make room for one that waits; 0: none.
  int64_t MostInTheWay(absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndCall(Entry& entry, grpc_status_code code, const std::string& reason)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const absl::Duration limit_;
  int64_t max_read_at_once_ = std::numeric_limits<int64_t>::max();
  std::function<void(absl::string_view peer)> on_call_;  // may be null
  mutable absl::Mutex mu_;
  std::map<int64_t, Entry> open_ ABSL_GUARDED_BY(mu_);  // by number
  std::map<std::string, Peer> peers_
      ABSL_GUARDED_BY(mu_);  // those with calls that wait or are read
  int64_t read_at_once_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t waiting_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t leaving_ ABSL_GUARDED_BY(mu_) = 0;  // of those that are read, the ones that were ended
  int64_t last_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t late_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t broken_off_ ABSL_GUARDED_BY(mu_) = 0;
  int64_t streams_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<std::string, int64_t> streams_of_ ABSL_GUARDED_BY(mu_);  // by peer
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
