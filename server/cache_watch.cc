#include "server/cache_watch.h"

#include <algorithm>
#include <optional>
#include <utility>

#include <grpc/grpc.h>
#include <prometheus/registry.h>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "model/prefill/prefix_cache.h"
#include "model/prefill/prefix_events.h"
#include "proto/status_macros.h"
#include "proto/wire/grpc_status.h"
#include "server/attention_request.h"
#include "server/refusal_cause.h"
#include "server/request_log.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

// With tokens a change has up to 700 bytes.
constexpr size_t kMaxChanges = 256;  // of one message

class RefusedWatch final : public CacheWatch::Stream {
 public:
  explicit RefusedWatch(const absl::Status& status) { Finish(wire::ToGrpc(status)); }

 private:
  void OnDone() override { delete this; }
};

std::string Bytes(const model::PrefixKey& key) { return {key.begin(), key.end()}; }

v1::PrefixCacheChange ToProto(const model::PrefixEvent& event, bool with_tokens) {
  v1::PrefixCacheChange change;
  if (!event.stored) {
    change.set_removed(Bytes(event.key));
    return change;
  }
  v1::CachedBlock& block = *change.mutable_stored();
  block.set_key(Bytes(event.key));
  if (event.parent.has_value()) block.set_parent(Bytes(*event.parent));
  block.set_policy(server::ToProto(event.policy));
  if (with_tokens && !event.is_private) {
    block.mutable_token_ids()->Assign(event.tokens.begin(), event.tokens.end());
  }
  return change;
}

}  // namespace

// Co-owned by the watch, until gRPC is done with the call, and by whoever sends news.
class CacheWatch::WatchStream final : public CacheWatch::Stream {
 public:
  WatchStream(CacheWatch& watch, grpc::CallbackServerContext* context, const Caller& caller,
              Identity identity, bool with_tokens)
      : watch_(watch),
        context_(context),
        caller_(caller),
        identity_(std::move(identity)),
        with_tokens_(with_tokens),
        follower_(*watch.index_) {}

  // May be called as long as the watch has this stream.
  const Identity& identity() const { return identity_; }

  // Sends what is new if the stream is idle, or ends it if its time has come. gRPC is called
  // without the lock. `writing_` keeps all other threads from it until the write is done; after
  // that `ended_` does.
  void Pump() {
    std::optional<absl::Status> end;
    {
      absl::MutexLock lock(&mu_);
      if (writing_ || ended_) return;
      if (!NextMessage()) {
        if (!end_.has_value()) return;
        ended_ = true;
        end = end_;
      }
    }
    if (end.has_value()) {
      Finish(wire::ToGrpc(*end));
    } else {
      StartWrite(&message_);
    }
  }

  // Ends the stream, at once even if the caller does not take the message that is under way.
  // Returns false if it was ending.
  bool End(const absl::Status& status) {
    bool ends = false;
    {
      absl::MutexLock lock(&mu_);
      ends = SetEnd(status);
    }
    Pump();
    return ends;
  }
  // Ends it if the caller keeps it from reading changes until they are gone.
  void EndIfBehind() {
    absl::MutexLock lock(&mu_);
    if (!writing_ || end_.has_value() || !follower_.IsBehind()) return;
    SetEnd(follower_.Next(1).status());
    watch_.behind_.Increment();
  }

 private:
  // Makes the next message in message_. Returns false if there is none, because there is nothing
  // new or because the stream ends.
  bool NextMessage() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (end_.has_value()) return false;
    const auto batch = follower_.Next(kMaxChanges);
    if (!batch.ok()) {
      end_ = batch.status();
      watch_.behind_.Increment();
      return false;
    }
    if (!batch->has_value()) return false;
    message_.Clear();
    if (std::exchange(is_first_, false)) {
      message_.set_model_fingerprint(watch_.model_fingerprint_);
      message_.set_block_tokens(model::kPrefixBlockTokens);
    }
    message_.set_sequence((*batch)->last);
    message_.set_in_snapshot((*batch)->in_snapshot);
    for (const model::PrefixEvent& event : (*batch)->events) {
      *message_.add_changes() = ToProto(event, with_tokens_);
    }
    writing_ = true;
    ++updates_;
    return true;
  }

  // While a message is being written, gRPC still needs the context, and Finish would wait behind
  // that message.
  bool SetEnd(const absl::Status& status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (end_.has_value() || ended_) return false;
    end_ = status;
    if (!writing_) return true;
    const grpc::Status grpc_status = wire::ToGrpc(status);
    grpc_call_cancel_with_status(context_->c_call(),
                                 static_cast<grpc_status_code>(grpc_status.error_code()),
                                 grpc_status.error_message().c_str(), nullptr);
    return true;
  }

  void OnWriteDone(bool ok) override {
    {
      absl::MutexLock lock(&mu_);
      writing_ = false;
      if (!ok) SetEnd(absl::CancelledError("the stream broke"));
    }
    Pump();
  }
  void OnCancel() override { End(absl::CancelledError("the caller is gone")); }
  void OnDone() override {
    {
      absl::MutexLock lock(&mu_);
      LogCacheWatch(caller_, updates_, end_.value_or(absl::CancelledError("the caller is gone")));
    }
    watch_.Remove(this);
  }

  CacheWatch& watch_;
  grpc::CallbackServerContext* const context_;
  const Caller caller_;
  const Identity identity_;
  const bool with_tokens_;

  absl::Mutex mu_;
  model::PrefixFollower follower_ ABSL_GUARDED_BY(mu_);
  bool is_first_ ABSL_GUARDED_BY(mu_) = true;
  int64_t updates_ ABSL_GUARDED_BY(mu_) = 0;
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;  // Finish was called
  std::optional<absl::Status> end_ ABSL_GUARDED_BY(mu_);
  v1::PrefixCacheUpdate message_;  // gRPC's while writing_
};

CacheWatch::CacheWatch(const model::PrefixCache* index, CacheWatchRules rules,
                       std::string model_fingerprint, prometheus::Registry& registry)
    : index_(index),
      rules_(std::move(rules)),
      model_fingerprint_(std::move(model_fingerprint)),
      watchers_(prometheus::BuildGauge()
                    .Name("prefilld_prefix_cache_watchers")
                    .Help("Callers that follow the prefix cache.")
                    .Register(registry)
                    .Add({})),
      behind_(prometheus::BuildCounter()
                  .Name("prefilld_prefix_cache_watchers_behind_total")
                  .Help("Callers that read the changes of the prefix cache too slowly.")
                  .Register(registry)
                  .Add({})),
      revoked_(prometheus::BuildCounter()
                   .Name("prefilld_prefix_cache_watchers_revoked_total")
                   .Help("Callers that followed the prefix cache until the operator's file of "
                         "tenants did not let them any longer.")
                   .Register(registry)
                   .Add({})) {}

CacheWatch::~CacheWatch() = default;

absl::Status CacheWatch::CheckCaller(const Identity& identity) const {
  PREFILLD_ASSIGN_OR_RETURN(const std::string tenant, identity());
  const auto& allowed = rules_.watchers;
  const auto is_allowed = [&allowed](absl::string_view name) {
    return std::find(allowed.begin(), allowed.end(), name) != allowed.end();
  };
  if (is_allowed(kAllWatchers) || is_allowed(tenant)) return absl::OkStatus();
  return absl::PermissionDeniedError(
      allowed.empty() ? "this server lets nobody follow its prefix cache"
                      : absl::StrCat("tenant ", tenant, " may not follow the prefix cache"));
}

absl::Status CacheWatch::CheckRoom() const {
  if (!closed_.empty()) return absl::UnavailableError(closed_);
  if (index_ == nullptr || !index_->keeps_events()) {
    return Because(RefusalCause::kInvalid,
                   absl::FailedPreconditionError("this server has no prefix cache"));
  }
  if (streams_.size() >= kMaxWatchers) {
    return Because(
        RefusalCause::kWatchers,
        absl::ResourceExhaustedError(absl::StrCat(
            streams_.size(), " callers follow the prefix cache; at most ", kMaxWatchers)));
  }
  return absl::OkStatus();
}

CacheWatch::Stream* CacheWatch::Watch(grpc::CallbackServerContext* context, const Caller& caller,
                                      Identity identity, const v1::WatchPrefixCacheRequest& request,
                                      absl::FunctionRef<void(const absl::Status&)> on_refused) {
  std::shared_ptr<WatchStream> stream;
  {
    absl::MutexLock lock(&mu_);
    // The caller is looked at under the lock, so that CheckCallers either finds the stream or comes
    // before this look.
    absl::Status may = CheckCaller(identity);
    if (may.ok()) may = CheckRoom();
    if (!may.ok()) {
      on_refused(may);
      return new RefusedWatch(may);
    }
    stream = std::make_shared<WatchStream>(*this, context, caller, std::move(identity),
                                           rules_.tokens && request.token_ids());
    streams_.push_back(stream);
    watchers_.Set(static_cast<double>(streams_.size()));
  }
  stream->Pump();
  return stream.get();
}

void CacheWatch::CheckCallers() {
  std::vector<std::pair<std::shared_ptr<WatchStream>, absl::Status>> refused;
  {
    // A stream leaves before gRPC lets go of its call, and waits for this lock to do so.
    absl::MutexLock lock(&mu_);
    for (const auto& stream : streams_) {
      if (absl::Status may = CheckCaller(stream->identity()); !may.ok()) {
        refused.emplace_back(stream, wire::WithPrefix("the tenants have changed: ", may));
      }
    }
  }
  for (const auto& [stream, why] : refused) {
    if (stream->End(why)) revoked_.Increment();
  }
}

void CacheWatch::SendNews() {
  for (const auto& stream : streams()) {
    stream->EndIfBehind();
    stream->Pump();
  }
}

void CacheWatch::Close(const std::string& reason) {
  {
    absl::MutexLock lock(&mu_);
    if (closed_.empty()) closed_ = reason;
  }
  for (const auto& stream : streams()) stream->End(absl::UnavailableError(reason));
}

std::vector<std::shared_ptr<CacheWatch::WatchStream>> CacheWatch::streams() const {
  absl::MutexLock lock(&mu_);
  return streams_;
}

void CacheWatch::Remove(const WatchStream* stream) {
  std::shared_ptr<WatchStream> last_reference;  // released after the lock
  absl::MutexLock lock(&mu_);
  const auto at = std::find_if(streams_.begin(), streams_.end(),
                               [stream](const auto& entry) { return entry.get() == stream; });
  last_reference = std::move(*at);
  streams_.erase(at);
  watchers_.Set(static_cast<double>(streams_.size()));
}

}  // namespace prefilld::server
