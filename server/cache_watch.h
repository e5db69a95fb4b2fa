// Those who follow the prefix cache: who may, and the streams by which they are told.
#ifndef PREFILLD_SERVER_CACHE_WATCH_H_
#define PREFILLD_SERVER_CACHE_WATCH_H_

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>
#include <prometheus/counter.h>
#include <prometheus/gauge.h>

#include "absl/base/thread_annotations.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "prefill/v1/prefill.pb.h"
#include "server/caller.h"
#include "server/server_options.h"

namespace prometheus {
class Registry;
}

namespace prefilld::model {
class PrefixCache;
}

namespace prefilld::server {

// Each stream reads the index of the cache at its own pace. One that reads too slowly is ended when
// changes that it has not read are gone, so it holds up nobody and takes no more memory than one
// message. Thread-safe.
class CacheWatch {
 public:
  using Stream = grpc::ServerWriteReactor<::prefill::v1::PrefixCacheUpdate>;

  static constexpr size_t kMaxWatchers = 16;

  // Returns the name of the tenant that a caller is now, or why it is none.
  using Identity = std::function<absl::StatusOr<std::string>()>;

  // `index` is borrowed; null: the server has no prefix cache.
  CacheWatch(const model::PrefixCache* index, CacheWatchRules rules, std::string model_fingerprint,
             prometheus::Registry& registry);
  // Every stream must be over.
  ~CacheWatch();

  // Makes the stream of a caller. It ends at once if the caller may not follow, and `on_refused`
  // hears why. `identity` is called, by any thread, as long as gRPC has the call.
  Stream* Watch(grpc::CallbackServerContext* context, const Caller& caller, Identity identity,
                const ::prefill::v1::WatchPrefixCacheRequest& request,
                absl::FunctionRef<void(const absl::Status&)> on_refused);

  // Ends the streams of those who may no longer follow, with the status that a new call of theirs
  // gets. Must be called when the tenants have changed.
  void CheckCallers();

  // Tells everybody what is new. Must be called every few milliseconds, by one thread.
  void SendNews();
  // Ends every stream, and those that are still to come, with UNAVAILABLE.
  void Close(const std::string& reason);

 private:
  class WatchStream;

  absl::Status CheckCaller(const Identity& identity) const;
  absl::Status CheckRoom() const ABSL_SHARED_LOCKS_REQUIRED(mu_);
  std::vector<std::shared_ptr<WatchStream>> streams() const;
  void Remove(const WatchStream* stream);

  const model::PrefixCache* const index_;
  const CacheWatchRules rules_;
  const std::string model_fingerprint_;
  prometheus::Gauge& watchers_;
  prometheus::Counter& behind_;
  prometheus::Counter& revoked_;

  mutable absl::Mutex mu_;
  std::string closed_ ABSL_GUARDED_BY(mu_);  // reason; empty: open
  std::vector<std::shared_ptr<WatchStream>> streams_ ABSL_GUARDED_BY(mu_);
};

}  // namespace prefilld::server

#endif  // PREFILLD_SERVER_CACHE_WATCH_H_
