#include <algorithm>
#include <cstdio>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/progress_line.h"
#include "client/cli/prompt.h"
#include "client/cli/summary.h"
#include "client/lane_choice.h"
#include "client/prefill_client.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::Accepted;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::Progress;

constexpr absl::Duration kInfoTimeout = absl::Seconds(10);

// Drops the cache and notes when it came.
class DiscardingSink : public KvSink {
 public:
  explicit DiscardingSink(bool show_progress) : progress_(show_progress) {}

  absl::Status OnAccepted(const Accepted& accepted) override {
    times_.num_layers = accepted.layout().num_layers();
    return absl::OkStatus();
  }

  absl::Status OnProgress(const Progress& progress) override {
    absl::MutexLock lock(&mu_);
    progress_.Update(progress, bytes_);
    return absl::OkStatus();
  }

  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    absl::MutexLock lock(&mu_);
    const uint64_t now_us = absl::ToInt64Microseconds(absl::Now() - start_);
    if (bytes_ == 0) {
      times_.first_frame_us = now_us;
      times_.layers_computed_at_first_frame = frame.layers_computed;
    }
    times_.last_frame_us = now_us;
    bytes_ += frame.payload.size();
    if (frame.layers_computed < times_.num_layers) overlapped_bytes_ += frame.payload.size();
    return absl::OkStatus();
  }

  // Returns the times; must be called after the call has ended.
  TransferTimes End() {
    absl::MutexLock lock(&mu_);
    progress_.Clear();
    times_.total_us = absl::ToInt64Microseconds(absl::Now() - start_);
    if (bytes_ > 0) times_.overlap = static_cast<double>(overlapped_bytes_) / bytes_;
    return times_;
  }

 private:
  const absl::Time start_ = absl::Now();
  absl::Mutex mu_;
  ProgressLine progress_ ABSL_GUARDED_BY(mu_);
  TransferTimes times_;  // guarded by mu_ once frames may come
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t overlapped_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

PrefillRequest MakeRequest(const CliOptions& options, const Prompt& prompt) {
  PrefillRequest request;
  request.set_request_id(options.request_id);
  request.mutable_token_ids()->Assign(prompt.token_ids.begin(), prompt.token_ids.end());
  *request.mutable_layout() = options.layout;
  *request.mutable_sampling() = options.sampling;
  *request.mutable_attention() = options.attention;
  request.set_num_lanes(options.lanes);
  request.set_layer_stats(options.layer_stats);
  request.set_priority(options.priority);
  request.set_prompt_logprobs(options.prompt_logprobs);
  *request.mutable_prefix_cache() = options.prefix_cache;
  if (!options.deliver_to.empty()) {
    request.mutable_deliver_to()->set_address(options.deliver_to);
    request.mutable_deliver_to()->set_transfer_id(options.transfer_id);
  }
  return request;
}

}  // namespace

absl::Status RunPrefill(const CliOptions& options, Cancellation& cancellation) {
  PREFILLD_ASSIGN_OR_RETURN(const Prompt prompt, ReadPrompt(options.prompt));
  PREFILLD_ASSIGN_OR_RETURN(const auto client,
                            PrefillClient::Create(options.channel, options.servers));
  uint64_t kv_bytes_per_token = 0;
  if (prompt.text != nullptr || options.lanes == 0) {
    PREFILLD_ASSIGN_OR_RETURN(const auto info,
                              client->GetServerInfo(std::min(options.timeout, kInfoTimeout)));
    kv_bytes_per_token = KvBytesPerToken(info, options.layout);
    if (prompt.text != nullptr) {
      PREFILLD_RETURN_IF_ERROR(
          CheckServedModel(options.prompt.model_dir, info.vocab_size(), info.num_layers()));
    }
  }
  DiscardingSink sink(!options.quiet);
  const auto result = client->Prefill(MakeRequest(options, prompt), sink,
                                      {.deadline = absl::Now() + options.timeout,
                                       .cancellation = &cancellation,
                                       .metadata = options.metadata,
                                       .resumable = true,
                                       .kv_bytes_per_token = kv_bytes_per_token});
  const TransferTimes times = sink.End();
  if (!result.ok()) return result.status();
  if (options.json) {
    std::printf("%s\n", ToJson(*result, times).dump(2).c_str());
  } else {
    std::printf("%s", Summary(*result, times).c_str());
  }
  return absl::OkStatus();
}

absl::Status RunInfo(const CliOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(const auto client,
                            PrefillClient::Create(options.channel, options.servers));
  PREFILLD_ASSIGN_OR_RETURN(const auto info,
                            client->GetServerInfo(std::min(options.timeout, kInfoTimeout)));
  if (options.json) {
    std::printf("%s\n", ToJson(info).dump(2).c_str());
  } else {
    std::printf("%s", Summary(info).c_str());
  }
  return absl::OkStatus();
}

}  // namespace prefilld::client
