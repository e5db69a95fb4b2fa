#include "client/cli/load_run.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "proto/status_macros.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;

constexpr absl::Duration kTick = absl::Milliseconds(100);  // a cancellation is seen within it
constexpr absl::Duration kLookInterval = absl::Seconds(1);

// Drops the cache and notes when it came. gRPC calls it for one event after the other.
class TimingSink final : public KvSink {
 public:
  absl::Status OnAccepted(const ::prefill::v1::Accepted&) override {
    accepted_at_ = absl::Now();
    return absl::OkStatus();
  }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    last_block_at_ = absl::Now();
    kv_bytes_ += static_cast<int64_t>(frame.payload.size());
    return absl::OkStatus();
  }

  // Fills in what is known at the end, now, of a request that was due at `due`.
  void Describe(absl::Time due, absl::Time now, const absl::StatusOr<PrefillResult>& result,
                LoadEnd& end) const {
    end.code = result.status().code();
    end.ended = now - due;
    end.kv_bytes = kv_bytes_;
    if (!result.ok()) return;
    end.result = end.ended;
    if (last_block_at_.has_value()) end.last_block = *last_block_at_ - due;
    // The result comes behind the last block. The server says how long it took to the first token.
    end.first_token =
        accepted_at_ - due + absl::Microseconds(result->queue_us() + result->compute_us());
    end.cached_tokens = result->cached_tokens();
  }

 private:
  absl::Time accepted_at_;
  std::optional<absl::Time> last_block_at_;
  int64_t kv_bytes_ = 0;
};

class Load {
 public:
  Load(const std::vector<LoadRequest>& requests,
       absl::Span<const std::unique_ptr<PrefillClient>> clients, const LoadOptions& options,
       const Cancellation& cancellation, absl::FunctionRef<void(const LoadProgress&)> watch)
      : requests_(requests),
        clients_(clients),
        options_(options),
        cancellation_(cancellation),
        watch_(watch),
        began_(absl::Now()) {
    outcome_.sender.max_in_flight = options.max_in_flight;
  }

  absl::StatusOr<LoadOutcome> Run() {
    absl::Status status;
    for (size_t i = 0; i < requests_.size() && status.ok() && !cancellation_.cancelled(); ++i) {
      // It is made before it is due, because that takes time.
      const PrefillRequest request = MakeRequest(i);
      if (AwaitTurn(began_ + requests_[i].arrival)) status = Send(i, request);
    }
    if (!status.ok()) CancelAll();
    AwaitEnds();
    PREFILLD_RETURN_IF_ERROR(status);
    absl::MutexLock lock(&mu_);
    return std::move(outcome_);
  }

 private:
  struct Call {
    TimingSink sink;
    LoadEnd end;
    std::shared_ptr<StartedPrefill> started;
  };

  PrefillRequest MakeRequest(size_t i) const {
    const LoadRequest& load = requests_[i];
    PrefillRequest request = options_.request;
    const std::vector<uint32_t> tokens = TokensOf(load, i, options_.seed, options_.vocab_size);
    request.mutable_token_ids()->Assign(tokens.begin(), tokens.end());
    request.set_priority(load.priority);
    if (options_.last_blocks >= 0) {
      const int64_t block_tokens = request.layout().block_tokens() == 0
                                       ? wire::kDefaultBlockTokens
                                       : request.layout().block_tokens();
      const int64_t blocks = (load.num_tokens + block_tokens - 1) / block_tokens;
      request.mutable_layout()->set_first_block(
          static_cast<uint32_t>(std::max<int64_t>(0, blocks - options_.last_blocks)));
    }
    return request;
  }

  // Waits until the moment has come and another request may be in flight. Returns false when the
  // load is cancelled meanwhile.
  bool AwaitTurn(absl::Time due) {
    for (absl::Time now = absl::Now(); now < due; now = absl::Now()) {
      if (cancellation_.cancelled()) return false;
      Look();
      absl::SleepFor(std::min(due - now, kTick));
    }
    const auto has_room = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) {
      return static_cast<int64_t>(calls_.size()) < options_.max_in_flight;
    };
    for (bool held_back = false; !cancellation_.cancelled(); held_back = true) {
      {
        absl::MutexLock lock(&mu_);
        if (!held_back && !has_room()) ++outcome_.sender.held_back;
        if (mu_.AwaitWithTimeout(absl::Condition(&has_room), kTick)) return true;
      }
      Look();
    }
    return false;
  }

  absl::Status Send(size_t i, const PrefillRequest& request) {
    PrefillCallOptions options;
    options.metadata = options_.metadata;
    if (!requests_[i].tenant.empty()) {
      options.metadata.emplace_back(options_.tenant_key, requests_[i].tenant);
    }
    const absl::Time now = absl::Now();
    options.deadline = now + options_.timeout;
    Call* call;
    {
      absl::MutexLock lock(&mu_);
      call = (calls_[i] = std::make_unique<Call>()).get();
      call->end.request = requests_[i];
      call->end.late = now - (began_ + requests_[i].arrival);
      outcome_.sender.most_in_flight =
          std::max(outcome_.sender.most_in_flight, static_cast<int64_t>(calls_.size()));
      ++sent_;
    }
    auto started = clients_[i % clients_.size()]->Start(
        request, call->sink, options,
        [this, i](const absl::StatusOr<PrefillResult>& result) { OnEnd(i, result); });
    absl::MutexLock lock(&mu_);
    if (!started.ok()) {
      calls_.erase(i);
      return started.status();
    }
    if (const auto open = calls_.find(i); open != calls_.end()) open->second->started = *started;
    return absl::OkStatus();
  }

  void OnEnd(size_t i, const absl::StatusOr<PrefillResult>& result) {
    const absl::Time now = absl::Now();
    absl::MutexLock lock(&mu_);
    const auto call = calls_.find(i);
    LoadEnd& end = call->second->end;
    call->second->sink.Describe(began_ + end.request.arrival, now, result, end);
    if (!result.ok()) ++failed_;
    if (end.first_token.has_value()) {
      first_tokens_ms_.push_back(absl::ToDoubleMilliseconds(*end.first_token));
    }
    outcome_.ends.push_back(std::move(end));
    calls_.erase(call);
  }

  void CancelAll() {
    std::vector<std::shared_ptr<StartedPrefill>> open;
    {
      absl::MutexLock lock(&mu_);
      for (const auto& [i, call] : calls_) {
        if (call->started != nullptr) open.push_back(call->started);
      }
    }
    for (const auto& call : open) call->Cancel();
  }

  void AwaitEnds() {
    const auto none_is_open = [this]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return calls_.empty(); };
    bool cancelled = false;
    while (true) {
      if (cancellation_.cancelled() && !std::exchange(cancelled, true)) CancelAll();
      {
        absl::MutexLock lock(&mu_);
        if (mu_.AwaitWithTimeout(absl::Condition(&none_is_open), kTick)) break;
      }
      Look();
    }
  }

  // Percentiles take time, and requests must leave on time.
  void Look() {
    const absl::Time now = absl::Now();
    if (now < next_look_) return;
    next_look_ = now + kLookInterval;
    LoadProgress progress = {.time = now - began_, .requests = requests_.size()};
    std::vector<double> times;
    {
      absl::MutexLock lock(&mu_);
      progress.sent = sent_;
      progress.in_flight = calls_.size();
      progress.failed = failed_;
      times = first_tokens_ms_;
    }
    if (!times.empty()) {
      std::sort(times.begin(), times.end());
      progress.first_token_p50_ms = Percentile(times, 0.5);
      progress.first_token_p99_ms = Percentile(times, 0.99);
    }
    watch_(progress);
  }

  const std::vector<LoadRequest>& requests_;
  const absl::Span<const std::unique_ptr<PrefillClient>> clients_;
  const LoadOptions& options_;
  const Cancellation& cancellation_;
  const absl::FunctionRef<void(const LoadProgress&)> watch_;
  const absl::Time began_;
  absl::Time next_look_ = began_ + kLookInterval;

  absl::Mutex mu_;
  absl::flat_hash_map<size_t, std::unique_ptr<Call>> calls_ ABSL_GUARDED_BY(mu_);  // in flight
  size_t sent_ ABSL_GUARDED_BY(mu_) = 0;
  size_t failed_ ABSL_GUARDED_BY(mu_) = 0;
  std::vector<double> first_tokens_ms_ ABSL_GUARDED_BY(mu_);
  LoadOutcome outcome_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

absl::StatusOr<LoadOutcome> RunLoad(const std::vector<LoadRequest>& requests,
                                    absl::Span<const std::unique_ptr<PrefillClient>> clients,
                                    const LoadOptions& options, const Cancellation& cancellation,
                                    absl::FunctionRef<void(const LoadProgress&)> watch) {
  return Load(requests, clients, options, cancellation, watch).Run();
}

}  // namespace prefilld::client
