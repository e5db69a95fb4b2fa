#include "server/request_record.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "server/prefill_work.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

void SetSummary(const std::vector<model::HeadRecall>& heads, model::PatternSource source,
                v1::RecallSummary* (v1::RecallAudit::*mutable_summary)(), v1::RecallAudit& audit) {
  const std::optional<model::RecallSummary> summary = RecallOf(heads, source);
  if (!summary.has_value()) return;
  v1::RecallSummary& proto = *(audit.*mutable_summary)();
  proto.set_mean(summary->mean);
  proto.set_fifth_percentile(summary->fifth_percentile);
  proto.set_lowest(summary->lowest.recall);
  proto.set_lowest_layer(summary->lowest.layer);
  proto.set_lowest_head(summary->lowest.head);
  for (const model::HeadRecall& head : heads) {
    if (head.source == source) proto.add_heads(head.recall);
  }
}

v1::LayerStats EncodeLayer(const model::LayerReport& report) {
  v1::LayerStats stats;
  stats.set_layer(report.layer);
  stats.set_dense_heads(report.dense_heads);
  stats.set_pivot_heads(report.pivot_heads);
  stats.set_shared_heads(report.shared_heads);
  stats.set_score_sharing_heads(report.score_sharing_heads);
  stats.set_scored_heads(report.scored_heads);
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
    SetSummary(heads, model::PatternSource::kScored, &Audit::mutable_scored, audit);
    SetSummary(heads, model::PatternSource::kVerticalSlash, &Audit::mutable_vertical_slash, audit);
    SetSummary(heads, model::PatternSource::kBaseline, &Audit::mutable_baseline, audit);
    audit.set_audit_us(report.audit_us);
  }
  return stats;
}

v1::SampledToken EncodeToken(const model::SampledToken& token) {
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

// Adds up every field but the density.
void Add(const model::LayerReport& layer, model::LayerReport& sum) {
  sum.dense_heads += layer.dense_heads;
  sum.pivot_heads += layer.pivot_heads;
  sum.shared_heads += layer.shared_heads;
  sum.score_sharing_heads += layer.score_sharing_heads;
  sum.scored_heads += layer.scored_heads;
  sum.vertical_slash_heads += layer.vertical_slash_heads;
  sum.baseline_heads += layer.baseline_heads;
  sum.num_queries += layer.num_queries;
  sum.compute_us += layer.compute_us;
  sum.attention_us += layer.attention_us;
  sum.pattern_us += layer.pattern_us;
  sum.recall.insert(sum.recall.end(), layer.recall.begin(), layer.recall.end());
  sum.audit_us += layer.audit_us;
}

}  // namespace

std::optional<model::RecallSummary> RecallOf(const std::vector<model::HeadRecall>& heads,
                                             model::PatternSource source) {
  std::vector<model::HeadRecall> of_source;
  std::copy_if(heads.begin(), heads.end(), std::back_inserter(of_source),
               [source](const model::HeadRecall& head) { return head.source == source; });
  if (of_source.empty()) return std::nullopt;
  return model::Summarize(of_source);
}

void RequestRecord::Start(absl::Time now, model::AttentionPolicy policy, int batch_prompts,
                          int64_t cached_tokens) {
  absl::MutexLock lock(&mu_);
  stats_.started_at = now;
  stats_.policy = policy;
  stats_.batch_prompts = batch_prompts;
  stats_.cached_tokens = cached_tokens;
}

void RequestRecord::AddLayer(const model::LayerReport& report) {
  absl::MutexLock lock(&mu_);
  ++stats_.layers_computed;
  layers_.push_back(report);
  Add(report, stats_.total);
  density_times_queries_ += report.density * static_cast<double>(report.num_queries);
  if (stats_.total.num_queries > 0) {
    stats_.total.density = density_times_queries_ / static_cast<double>(stats_.total.num_queries);
  }
}

void RequestRecord::AddStall(absl::Duration stalled) {
  absl::MutexLock lock(&mu_);
  stats_.stalled += stalled;
}

void RequestRecord::SetFirstToken(absl::Time now, model::SampledToken token) {
  absl::MutexLock lock(&mu_);
  stats_.first_token_at = now;
  first_token_ = std::move(token);
}

void RequestRecord::AddLogprobs(const model::PromptLogprobs& part, absl::Duration took) {
  absl::MutexLock lock(&mu_);
  stats_.logprobs = stats_.logprobs.value_or(absl::ZeroDuration()) + took;
  logprobs_.of_token.insert(logprobs_.of_token.end(), part.of_token.begin(), part.of_token.end());
  logprobs_.of_best.insert(logprobs_.of_best.end(), part.of_best.begin(), part.of_best.end());
}

void RequestRecord::Follow(const RequestRecord& other) {
  other.mu_.Lock();
  RequestStats stats = other.stats_;
  std::vector<model::LayerReport> layers = other.layers_;
  model::SampledToken first_token = other.first_token_;
  other.mu_.Unlock();
  absl::MutexLock lock(&mu_);
  stats.accepted_at = stats_.accepted_at;
  stats.logprobs = std::nullopt;
  stats_ = std::move(stats);
  layers_ = std::move(layers);
  first_token_ = std::move(first_token);
}

RequestStats RequestRecord::stats() const {
  absl::MutexLock lock(&mu_);
  return stats_;
}

v1::PrefillResult RequestRecord::TakeResult(bool layers) {
  absl::MutexLock lock(&mu_);
  v1::PrefillResult result;
  const absl::Time started = stats_.started_at.value_or(stats_.accepted_at);
  const absl::Time first_token = stats_.first_token_at.value_or(started);
  // A receiver may have come after the start of what it receives.
  const absl::Duration queued = std::max(started - stats_.accepted_at, absl::ZeroDuration());
  result.set_policy(ToProto(stats_.policy.value_or(model::AttentionPolicy::kAuto)));
  result.set_batch_prompts(stats_.batch_prompts);
  result.set_cached_tokens(static_cast<uint32_t>(stats_.cached_tokens));
  result.set_queue_us(absl::ToInt64Microseconds(queued));
  result.set_compute_us(absl::ToInt64Microseconds(first_token - started));
  result.set_stall_us(absl::ToInt64Microseconds(stats_.stalled));
  *result.mutable_total() = EncodeLayer(stats_.total);
  if (layers) {
    for (const auto& layer : layers_) *result.add_layers() = EncodeLayer(layer);
  }
  *result.mutable_first_token() = EncodeToken(first_token_);
  const model::PromptLogprobs logprobs = std::exchange(logprobs_, {});
  result.mutable_prompt_logprobs()->Add(logprobs.of_token.begin(), logprobs.of_token.end());
  result.mutable_best_logprobs()->Add(logprobs.of_best.begin(), logprobs.of_best.end());
  result.set_logprobs_us(absl::ToInt64Microseconds(stats_.logprobs.value_or(absl::Duration())));
  return result;
}

}  // namespace prefilld::server
