#include "server/prefill_job.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr absl::Duration kClockSlack = absl::Milliseconds(50);

void SetSummary(const std::vector<model::HeadRecall>& heads, model::PatternSource source,
                v1::RecallSummary* (v1::RecallAudit::*mutable_summary)(), v1::RecallAudit& audit) {
  std::vector<model::HeadRecall> of_source;
  std::copy_if(heads.begin(), heads.end(), std::back_inserter(of_source),
               [source](const model::HeadRecall& head) { return head.source == source; });
  if (of_source.empty()) return;
  const model::RecallSummary summary = model::Summarize(of_source);
  v1::RecallSummary& proto = *(audit.*mutable_summary)();
  proto.set_mean(summary.mean);
  proto.set_fifth_percentile(summary.fifth_percentile);
  proto.set_lowest(summary.lowest.recall);
  proto.set_lowest_layer(summary.lowest.layer);
  proto.set_lowest_head(summary.lowest.head);
  for (const model::HeadRecall& head : of_source) proto.add_heads(head.recall);
}

v1::LayerStats ToProto(const model::LayerReport& report) {
  v1::LayerStats stats;
  stats.set_layer(report.layer);
  stats.set_dense_heads(report.dense_heads);
  stats.set_pivot_heads(report.pivot_heads);
  stats.set_shared_heads(report.shared_heads);
  stats.set_vertical_slash_heads(report.vertical_slash_heads);
  stats.set_num_queries(static_cast<uint64_t>(report.num_queries));
  stats.set_density(report.density);
  stats.set_compute_us(report.compute_us);
  stats.set_attention_us(report.attention_us);
  stats.set_pattern_us(report.pattern_us);
  stats.set_baseline_heads(report.baseline_heads);
  if (!report.recall.empty()) {
    using Audit = v1::RecallAudit;
    Audit& audit = *stats.mutable_recall();
    const std::vector<model::HeadRecall>& heads = report.recall;
    SetSummary(heads, model::PatternSource::kPivot, &Audit::mutable_shared, audit);
    SetSummary(heads, model::PatternSource::kVerticalSlash, &Audit::mutable_vertical_slash, audit);
    SetSummary(heads, model::PatternSource::kBaseline, &Audit::mutable_baseline, audit);
    audit.set_audit_us(report.audit_us);
  }
  return stats;
}

v1::SampledToken ToProto(const model::SampledToken& token) {
  v1::SampledToken proto;
  proto.set_token_id(token.token_id);
  proto.set_logprob(token.logprob);
  for (const auto& [id, logprob] : token.top_logprobs) {
    v1::TokenLogprob* top = proto.add_top_logprobs();
    top->set_token_id(id);
    top->set_logprob(logprob);
  }
  return proto;
}

}  // namespace

v1::LayerStats SumOf(const std::vector<model::LayerReport>& layers) {
  model::LayerReport sum;
  double density = 0.0;  // times queries
  for (const model::LayerReport& layer : layers) {
    sum.dense_heads += layer.dense_heads;
    sum.pivot_heads += layer.pivot_heads;
    sum.shared_heads += layer.shared_heads;
    sum.vertical_slash_heads += layer.vertical_slash_heads;
    sum.num_queries += layer.num_queries;
    density += layer.density * static_cast<double>(layer.num_queries);
    sum.compute_us += layer.compute_us;
    sum.attention_us += layer.attention_us;
    sum.pattern_us += layer.pattern_us;
    sum.baseline_heads += layer.baseline_heads;
    sum.recall.insert(sum.recall.end(), layer.recall.begin(), layer.recall.end());
    sum.audit_us += layer.audit_us;
  }
  if (sum.num_queries > 0) sum.density = density / static_cast<double>(sum.num_queries);
  return ToProto(sum);
}

PrefillJob::PrefillJob(PrefillWork work, const Clock& clock)
    : work_(std::move(work)), clock_(clock), delivery_(work_.num_lanes, work_.pushes(), clock) {
  last_event_at_ = stats_.accepted_at = clock.Now();
}

void PrefillJob::Accept(int64_t queue_position) {
  v1::PrefillEvent event;
  event.mutable_accepted()->set_request_id(work_.id);
  *event.mutable_accepted()->mutable_layout() = work_.layout;
  event.mutable_accepted()->set_num_lanes(work_.num_lanes);
  event.mutable_accepted()->set_queue_position(queue_position);
  delivery_.Send(event);
}

void PrefillJob::Start(model::AttentionPolicy policy, int batch_prompts) {
  const absl::Time now = clock_.Now();
  {
    absl::MutexLock lock(&mu_);
    stats_.started_at = now;
    stats_.policy = policy;
    stats_.batch_prompts = batch_prompts;
  }
  delivery_.OnStart(now);
  if (start_delivery_ != nullptr) start_delivery_();
}

void PrefillJob::RecordLayer(const model::LayerReport& report) {
  {
    absl::MutexLock lock(&mu_);
    stats_.layers.push_back(report);
  }
  delivery_.OnLayerComputed();
  SendProgress(0);
}

void PrefillJob::RecordStall(absl::Duration stalled) {
  absl::MutexLock lock(&mu_);
  stats_.stalled += stalled;
}

void PrefillJob::SendProgress(int64_t queue_position) {
  const absl::Time now = clock_.Now();
  v1::PrefillEvent event;
  v1::Progress& progress = *event.mutable_progress();
  {
    absl::MutexLock lock(&mu_);
    last_event_at_ = now;
    progress.set_layers_computed(stats_.layers.size());
    progress.set_elapsed_us(absl::ToInt64Microseconds(now - stats_.accepted_at));
  }
  progress.set_num_layers(work_.layout.num_layers());
  progress.set_queue_position(queue_position);
  delivery_.Send(event);
}

void PrefillJob::RecordFirstToken(model::SampledToken token) {
  absl::MutexLock lock(&mu_);
  stats_.first_token_at = clock_.Now();
  first_token_ = std::move(token);
}

void PrefillJob::RecordLogprobs(model::PromptLogprobs logprobs, absl::Duration took) {
  absl::MutexLock lock(&mu_);
  stats_.logprobs = took;
  logprobs_ = std::move(logprobs);
}

void PrefillJob::Finish() {
  v1::PrefillResult result;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time started = stats_.started_at.value_or(stats_.accepted_at);
    result.set_policy(server::ToProto(stats_.policy.value_or(work_.attention.policy)));
    result.set_batch_prompts(stats_.batch_prompts);
    result.set_queue_us(absl::ToInt64Microseconds(started - stats_.accepted_at));
    result.set_compute_us(
        absl::ToInt64Microseconds(stats_.first_token_at.value_or(clock_.Now()) - started));
    result.set_stall_us(absl::ToInt64Microseconds(stats_.stalled));
    *result.mutable_total() = SumOf(stats_.layers);
    if (work_.layer_stats) {
      for (const auto& layer : stats_.layers) *result.add_layers() = ToProto(layer);
    }
    *result.mutable_first_token() = ToProto(first_token_);
    const model::PromptLogprobs logprobs = std::exchange(logprobs_, {});
    result.mutable_prompt_logprobs()->Add(logprobs.of_token.begin(), logprobs.of_token.end());
    result.mutable_best_logprobs()->Add(logprobs.of_best.begin(), logprobs.of_best.end());
    result.set_logprobs_us(
        absl::ToInt64Microseconds(stats_.logprobs.value_or(absl::ZeroDuration())));
  }
  result.set_num_tokens(work_.tokens.size());
  delivery_.SendResult(std::move(result));
}

void PrefillJob::Abort(Outcome outcome, const absl::Status& status) {
  {
    absl::MutexLock lock(&mu_);
    if (ended_.exchange(true, std::memory_order_acq_rel)) return;
    outcome_ = outcome;
    status_ = status;
  }
  delivery_.Abort(status);
}

void PrefillJob::OnCallCancelled() {
  // gRPC cancels at the deadline too, by a clock of its own.
  if (clock_.Now() + kClockSlack >= work_.deadline) {
    Abort(Outcome::kDeadline,
          absl::DeadlineExceededError(absl::StrCat("the deadline passed ", Whereabouts())));
  } else {
    Abort(Outcome::kCancelled, absl::CancelledError(absl::StrCat("cancelled ", Whereabouts())));
  }
}

void PrefillJob::OnResultSent() {
  absl::MutexLock lock(&mu_);
  ended_.store(true, std::memory_order_release);
}

absl::Status PrefillJob::CheckConsumerSpeed(const JobTimeouts& timeouts, absl::Time now) const {
  const double min_speed = timeouts.min_consumer_bytes_per_s;
  if (min_speed <= 0) return absl::OkStatus();
  const LaneQueue::Taken taken = delivery_.KvTaken(now);
  const auto bytes = static_cast<double>(taken.payload_bytes);
  if (taken.busy <= timeouts.stall + absl::Seconds(bytes / min_speed)) return absl::OkStatus();
  return absl::AbortedError(
      absl::StrCat("the consumer took ", bytes * 1e-6, " MB in ", absl::FormatDuration(taken.busy),
                   " and others wait; at least ", min_speed * 1e-6, " MB/s after ",
                   absl::FormatDuration(timeouts.stall), ", ", Whereabouts()));
}

void PrefillJob::CheckTimers(const JobTimeouts& timeouts, int64_t queue_position,
                             bool others_wait) {
  if (ended()) return;
  const absl::Time now = clock_.Now();
  absl::Time accepted_at, last_event_at;
  {
    absl::MutexLock lock(&mu_);
    accepted_at = stats_.accepted_at;
    last_event_at = last_event_at_;
  }
  if (now >= work_.deadline) {
    Abort(Outcome::kDeadline,
          absl::DeadlineExceededError(absl::StrCat("the deadline passed ", Whereabouts())));
  } else if (delivery_.StalledFor(now) > timeouts.stall) {
    Abort(Outcome::kStalled, absl::AbortedError(absl::StrCat("the consumer took nothing for ",
                                                             absl::FormatDuration(timeouts.stall),
                                                             ", ", Whereabouts())));
  } else if (!work_.pushes() && !delivery_.all_attached() &&
             now - accepted_at > timeouts.lane_attach) {
    Abort(Outcome::kLanesMissing,
          absl::AbortedError(absl::StrCat("not all of ", work_.num_lanes,
                                          " lanes were attached within ",
                                          absl::FormatDuration(timeouts.lane_attach))));
  } else if (const absl::Status speed =
                 others_wait ? CheckConsumerSpeed(timeouts, now) : absl::OkStatus();
             !speed.ok()) {
    Abort(Outcome::kTooSlow, speed);
  } else if (now - last_event_at > timeouts.heartbeat && delivery_.control().idle()) {
    SendProgress(queue_position);
  }
}

std::string PrefillJob::Whereabouts() const {
  absl::MutexLock lock(&mu_);
  if (!stats_.started_at.has_value()) return "before the first layer";
  return absl::StrCat("after layer ", stats_.layers.size(), " of ", work_.layout.num_layers());
}

Outcome PrefillJob::outcome() const {
  absl::MutexLock lock(&mu_);
  return outcome_;
}

absl::Status PrefillJob::status() const {
  absl::MutexLock lock(&mu_);
  return status_;
}

absl::Duration PrefillJob::age() const {
  absl::MutexLock lock(&mu_);
  return clock_.Now() - stats_.accepted_at;
}

absl::Duration PrefillJob::time_left() const { return work_.deadline - clock_.Now(); }

JobStats PrefillJob::stats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

}  // namespace prefilld::server
