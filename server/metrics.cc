#include "server/metrics.h"

#include <algorithm>
#include <limits>
#include <utility>

#include <prometheus/registry.h>

#include "absl/strings/str_cat.h"
#include "server/version.h"

namespace prefilld::server {
namespace {

// The buckets reach from a millisecond to half an hour: from a step of a short prompt to a prompt
// of a million tokens.
const std::vector<double> kSeconds = {0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
                                      0.25,  0.5,    1,     2.5,  5,     10,   20,
                                      40,    60,     120,   300,  600,   1800};
const std::vector<double> kTokens = {128,   512,   1024,   2048,   4096,   8192,   16384,
                                     32768, 65536, 131072, 262144, 524288, 1048576};
const std::vector<double> kPrompts = {1, 2, 4, 8, 16, 32, 64, 128};
const std::vector<double> kShares = {0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0};

// The buckets are finer near 1, where recall is interesting.
const std::vector<double> kRecalls = {0.3, 0.5,   0.6,  0.7,   0.75, 0.8,   0.85,
                                      0.9, 0.925, 0.95, 0.975, 0.99, 0.999, 1.0};
// The values of the `kind` label of recall.
constexpr std::pair<model::PatternSource, const char*> kSparseKinds[] = {
    {model::PatternSource::kPivot, "shared"},
    {model::PatternSource::kScored, "scored"},
    {model::PatternSource::kVerticalSlash, "vertical_slash"},
    {model::PatternSource::kBaseline, "baseline"}};

// The values of the `kind` label of heads, one for each count in a layer's report.
constexpr std::pair<int model::LayerReport::*, const char*> kHeadKinds[] = {
    {&model::LayerReport::dense_heads, "dense"},
    {&model::LayerReport::pivot_heads, "pivot"},
    {&model::LayerReport::shared_heads, "shared"},
    {&model::LayerReport::score_sharing_heads, "score_sharing"},
    {&model::LayerReport::scored_heads, "scored"},
    {&model::LayerReport::vertical_slash_heads, "vertical_slash"},
    {&model::LayerReport::baseline_heads, "baseline"}};

// Lanes with higher numbers are counted with the last of these.
constexpr int kLanes = 16;

prometheus::Family<prometheus::Counter>& NewFamily(prometheus::Registry& registry,
                                                   const std::string& name,
                                                   const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry);
}

absl::flat_hash_map<Outcome, prometheus::Counter*> NewOutcomes(prometheus::Registry& registry,
                                                               const std::string& name,
                                                               const std::string& help) {
  auto& family = NewFamily(registry, name, help);
  absl::flat_hash_map<Outcome, prometheus::Counter*> counters;
  for (const Outcome outcome : kOutcomes) {
    counters[outcome] = &family.Add({{"outcome", Name(outcome)}});
  }
  return counters;
}

absl::flat_hash_map<RefusalCause, prometheus::Counter*> NewRefusals(
    prometheus::Registry& registry) {
  auto& family = NewFamily(registry, "prefilld_refusals_total",
                           "Calls that were refused, those that would attach included, by cause.");
  absl::flat_hash_map<RefusalCause, prometheus::Counter*> counters;
  for (const RefusalCause cause : kRefusalCauses) {
    counters[cause] = &family.Add({{"cause", Name(cause)}});
  }
  return counters;
}

absl::flat_hash_map<model::AttentionPolicy, prometheus::Counter*> NewPolicies(
    prometheus::Registry& registry) {
  auto& family = NewFamily(registry, "prefilld_policy_requests_total",
                           "Requests that began to compute, by the attention policy that ran.");
  absl::flat_hash_map<model::AttentionPolicy, prometheus::Counter*> counters;
  for (const model::AttentionPolicyInfo& info : model::kAttentionPolicies) {
    if (info.policy == model::AttentionPolicy::kAuto) continue;  // resolved before it runs
    counters[info.policy] = &family.Add({{"policy", info.name}});
  }
  return counters;
}

std::vector<std::pair<int model::LayerReport::*, prometheus::Counter*>> NewHeads(
    prometheus::Registry& registry) {
  auto& family = NewFamily(registry, "prefilld_heads_total",
                           "Query heads computed, by what was done for them.");
  std::vector<std::pair<int model::LayerReport::*, prometheus::Counter*>> counters;
  for (const auto& [count, kind] : kHeadKinds) {
    counters.emplace_back(count, &family.Add({{"kind", kind}}));
  }
  return counters;
}

std::vector<prometheus::Counter*> NewLanes(prometheus::Registry& registry, const std::string& name,
                                           const std::string& help) {
  auto& family = NewFamily(registry, name, help);
  std::vector<prometheus::Counter*> counters;
  for (int lane = 0; lane < kLanes; ++lane) {
    counters.push_back(&family.Add({{"lane", absl::StrCat(lane)}}));
  }
  return counters;
}

}  // namespace

Metrics::Metrics(const model::EngineInfo& engine, absl::Span<const Tenant> tenants)
    : registry_(std::make_shared<prometheus::Registry>()),
      requests_(NewOutcomes(*registry_, "prefilld_requests_total",
                            "Requests that are over, by how they ended.")),
      receivers_(NewOutcomes(*registry_, "prefilld_receivers_total",
                             "Further receivers of requests that are over, by how they ended.")),
      refusals_(NewRefusals(*registry_)),
      ignored_traces_(NewCounter("prefilld_trace_contexts_ignored_total",
                                 "Calls whose traceparent or tracestate was not valid and was not "
                                 "used.")),
      policies_(NewPolicies(*registry_)),
      fallbacks_(NewCounter("prefilld_policy_fallbacks_total",
                            "Requests for which another policy ran than was asked for, policy "
                            "auto that ran dense included.")),
      beyond_calibration_(NewCounter("prefilld_beyond_calibration_requests_total",
                                     "Requests whose prompts are too long for the loss that the "
                                     "cluster file promises; they run with built-in thresholds.")),
      time_to_first_token_(*registry_, kSeconds),
      queue_time_(NewHistogram("prefilld_queue_time_seconds",
                               "From the arrival of a request to its first layer.", kSeconds)),
      compute_time_(NewHistogram("prefilld_compute_time_seconds",
                                 "From the first layer of a request to its first token.",
                                 kSeconds)),
      request_time_(NewHistogram("prefilld_request_time_seconds",
                                 "From the arrival of a request to the end of its streams.",
                                 kSeconds)),
      prompt_tokens_(
          NewHistogram("prefilld_prompt_tokens", "Length of accepted prompts.", kTokens)),
      density_(NewHistogram("prefilld_attention_density",
                            "Computed share of the causal attention blocks of a request.",
                            kShares)),
      pattern_time_(NewHistogram("prefilld_pattern_time_seconds",
                                 "Estimating, deciding and building patterns, per request.",
                                 kSeconds)),
      tokens_per_second_(NewGauge("prefilld_prompt_tokens_per_second",
                                  "Speed of the latest prompt of which nothing was cached, from "
                                  "first layer to first token; in a batch its own tokens alone "
                                  "count.")),
      batch_prompts_(NewHistogram("prefilld_batch_prompts",
                                  "Prompts computed together, per pass through the layers.",
                                  kPrompts)),
      step_time_(NewHistogram("prefilld_step_time_seconds",
                              "One layer of one prompt, or of a batch.", kSeconds)),
      computed_layers_(NewCounter("prefilld_steps_total", "Layer steps computed.")),
      computed_token_layers_(NewCounter("prefilld_step_tokens_total",
                                        "Prompt tokens times layers computed, without cached ones; "
                                        "divide by the number of layers for prompt tokens.")),
      heads_(NewHeads(*registry_)),
      recall_audits_(NewCounter("prefilld_recall_audits_total",
                                "Requests whose recall was measured, sparse ones alone.")),
      recall_audit_time_(NewCounter("prefilld_recall_audit_seconds_total",
                                    "Compute time that measuring recall took.")),
      lane_bytes_(
          NewLanes(*registry_, "prefilld_kv_bytes_total", "KV payload handed to the transport.")),
      lane_frames_(
          NewLanes(*registry_, "prefilld_kv_frames_total", "KV frames handed to the transport.")),
      stall_time_(NewCounter("prefilld_stall_seconds_total",
                             "Time that layers waited for consumers to take frames of those "
                             "before; what is left to take after the last layer does not count.")),
      device_errors_(NewCounter("prefilld_device_errors_total", "Failures of the device.")),
      queued_requests_(NewGauge("prefilld_queued_requests", "Requests waiting to compute.")),
      queued_tokens_(NewGauge("prefilld_queued_tokens", "Prompt tokens waiting to compute.")),
      queued_tokens_limit_(NewGauge("prefilld_queued_tokens_limit",
                                    "Prompt tokens that may wait; prompts beyond are refused.")),
      running_requests_(NewGauge("prefilld_running_requests", "Requests computing.")),
      ended_in_passes_(NewGauge("prefilld_ended_requests_in_passes",
                                "Requests that have ended while the device was computing for "
                                "them; it stops at the next point inside the layer, or after it.")),
      computing_(NewGauge("prefilld_computing",
                          "1 while a step is computed, whether or not anybody waits for it.")),
      live_requests_(
          NewGauge("prefilld_live_requests",
                   "Requests queued, computing or still being sent, further receivers included.")),
      staged_bytes_(NewGauge("prefilld_staged_bytes", "Staging memory on loan to frames.")),
      staging_capacity_(NewGauge("prefilld_staging_capacity_bytes", "Staging memory.")),
      kv_utilization_(
          NewGauge("prefilld_kv_utilization", "Share of the KV staging memory in use, 0 to 1.")),
      device_bytes_(NewGauge("prefilld_device_memory_bytes",
                             "Memory of the device that weights, workspace and KV hold.")),
      resident_tokens_(NewGauge("prefilld_resident_tokens", "Tokens of the prompts under way.")),
      resident_tokens_limit_(
          NewGauge("prefilld_resident_tokens_limit",
                   "Tokens for which there is memory to have prompts under way.")),
      recorded_layers_(NewGauge("prefilld_recorded_layers",
                                "Layers of short prompts that are replayed as CUDA graphs, by "
                                "layer and length.")),
      prefix_cache_(*registry_),
      ready_(NewGauge("prefilld_ready", "1 while new requests are accepted.")),
      live_(NewGauge("prefilld_live",
                     "0 when work waits and nothing progresses, or no new "
                     "caller gets in.")),
      progressing_(NewGauge("prefilld_progressing", "0 when work waits and nothing progresses.")),
      drain_time_(
          NewGauge("prefilld_drain_seconds", "Time since the drain began; 0 while there is none.")),
      drain_timeout_(NewGauge("prefilld_drain_timeout_seconds",
                              "Time after which a drain ends the requests that are left.")),
      tenants_(*registry_, tenants),
      resumption_(*registry_),
      shared_memory_(*registry_) {
  prometheus::BuildGauge()
      .Name("prefilld_build_info")
      .Help("Constant 1; what runs here.")
      .Register(*registry_)
      .Add({{"version", kVersion},
            {"model", engine.model_name},
            {"fingerprint", engine.fingerprint},
            {"device", engine.device_name}})
      .Set(1);
  if (engine.calibrated_loss.has_value()) ShowCalibratedLoss(*engine.calibrated_loss);
  auto& recall = prometheus::BuildHistogram()
                     .Name("prefilld_attention_recall")
                     .Help(
                         "Share of the true attention mass inside the pattern of a sparse head, "
                         "of every head of the requests that are measured.")
                     .Register(*registry_);
  auto& lowest = prometheus::BuildGauge()
                     .Name("prefilld_attention_recall_lowest")
                     .Help(
                         "Recall of the worst head of the latest request that was measured; NaN "
                         "before the first.")
                     .Register(*registry_);
  for (const auto& [source, kind] : kSparseKinds) {
    recall_[source] = &recall.Add({{"kind", kind}}, kRecalls);
    lowest_recall_[source] = &lowest.Add({{"kind", kind}});
    // A value of 0 would set off an alarm before anything is measured.
    lowest_recall_[source]->Set(std::numeric_limits<double>::quiet_NaN());
  }
}

Metrics::~Metrics() = default;

void Metrics::ShowCalibratedLoss(const model::CalibratedLoss& loss) {
  auto& rise = prometheus::BuildGauge()
                   .Name("prefilld_calibrated_perplexity_rise")
                   .Help(
                       "Rise of perplexity over dense attention, 0.01 for 1 %: what the cluster "
                       "file promises, and what was measured in the mean and of the worst prompt.")
                   .Register(*registry_);
  rise.Add({{"kind", "promised"}}).Set(loss.max_perplexity_rise);
  rise.Add({{"kind", "measured"}}).Set(loss.perplexity_rise);
  rise.Add({{"kind", "worst_prompt"}}).Set(loss.worst_prompt);
  NewGauge("prefilld_calibrated_prompt_tokens", "The longest prompt for which this is promised.")
      .Set(static_cast<double>(loss.max_tokens()));
}

prometheus::Counter& Metrics::NewCounter(const std::string& name, const std::string& help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(*registry_).Add({});
}

prometheus::Gauge& Metrics::NewGauge(const std::string& name, const std::string& help) {
  return prometheus::BuildGauge().Name(name).Help(help).Register(*registry_).Add({});
}

prometheus::Histogram& Metrics::NewHistogram(const std::string& name, const std::string& help,
                                             const std::vector<double>& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(*registry_).Add({}, buckets);
}

void Metrics::CountRefused(Outcome outcome, const absl::Status& status) {
  requests_.at(outcome)->Increment();
  CountRefusal(status);
}

void Metrics::CountRefusal(const absl::Status& status) {
  refusals_.at(CauseOf(status))->Increment();
}

void Metrics::CountIgnoredTrace() { ignored_traces_.Increment(); }

void Metrics::CountRequest(const PrefillJob& job, absl::Time now) {
  requests_.at(job.ending().outcome)->Increment();
  tenants_.CountRequest(job);
  const RequestStats stats = job.record().stats();
  const auto seconds = [](absl::Duration d) { return absl::ToDoubleSeconds(d); };
  const auto num_tokens = static_cast<double>(job.work().tokens.size());

  request_time_.Observe(seconds(now - stats.accepted_at));
  prompt_tokens_.Observe(num_tokens);
  if (job.work().beyond_calibration) beyond_calibration_.Increment();
  if (!stats.started_at.has_value()) return;
  queue_time_.Observe(seconds(*stats.started_at - stats.accepted_at));
  if (stats.policy.has_value() && *stats.policy != model::AttentionPolicy::kAuto) {
    policies_.at(*stats.policy)->Increment();
    const auto asked = job.work().attention.policy;
    const bool auto_shares =
        asked == model::AttentionPolicy::kAuto && *stats.policy == model::AttentionPolicy::kShare;
    if (asked != *stats.policy && !auto_shares) fallbacks_.Increment();
  }
  if (!stats.first_token_at.has_value()) return;
  const absl::Duration compute = *stats.first_token_at - *stats.started_at;
  const model::LayerReport& total = stats.total;
  time_to_first_token_.Observe(stats.policy.value_or(model::AttentionPolicy::kAuto),
                               static_cast<int64_t>(job.work().tokens.size()),
                               *stats.first_token_at - stats.accepted_at);
  compute_time_.Observe(seconds(compute));
  density_.Observe(total.density);
  pattern_time_.Observe(static_cast<double>(total.pattern_us) * 1e-6);
  if (compute > absl::ZeroDuration() && stats.cached_tokens == 0) {
    tokens_per_second_.Set(num_tokens / seconds(compute));
  }
  if (total.recall.empty()) return;
  recall_audits_.Increment();
  for (const auto& [source, kind] : kSparseKinds) {
    if (const auto recall = RecallOf(total.recall, source)) {
      lowest_recall_.at(source)->Set(recall->lowest.recall);
    }
  }
}

void Metrics::CountReceiver(Outcome outcome) { receivers_.at(outcome)->Increment(); }

void Metrics::CountPass(int num_prompts) { batch_prompts_.Observe(num_prompts); }

void Metrics::CountLayer(const model::LayerReport& report, int num_prompts, int64_t num_tokens) {
  step_time_.Observe(static_cast<double>(report.compute_us) * 1e-6);
  computed_layers_.Increment();
  computed_token_layers_.Increment(static_cast<double>(num_tokens));
  for (const auto& [count, counter] : heads_) counter->Increment(num_prompts * (report.*count));
  for (const model::HeadRecall& head : report.recall) {
    recall_.at(head.source)->Observe(head.recall);
  }
  recall_audit_time_.Increment(static_cast<double>(report.audit_us) * 1e-6);
}

void Metrics::CountFrame(int lane, int64_t payload_bytes, bool is_shared) {
  shared_memory_.CountFrame(payload_bytes, is_shared);
  const size_t index = std::min(lane, kLanes - 1);
  lane_bytes_[index]->Increment(static_cast<double>(payload_bytes));
  lane_frames_[index]->Increment();
}

void Metrics::CountStall(absl::Duration stalled) {
  stall_time_.Increment(absl::ToDoubleSeconds(stalled));
}

void Metrics::CountDeviceError() { device_errors_.Increment(); }

void Metrics::Set(const ResourceUse& use) {
  queued_requests_.Set(static_cast<double>(use.queued_requests));
  queued_tokens_.Set(static_cast<double>(use.queued_tokens));
  running_requests_.Set(static_cast<double>(use.running_requests));
  ended_in_passes_.Set(static_cast<double>(use.ended_in_passes));
  computing_.Set(use.computing ? 1 : 0);
  live_requests_.Set(static_cast<double>(use.live_requests));
  staged_bytes_.Set(static_cast<double>(use.staged_bytes));
  staging_capacity_.Set(static_cast<double>(use.staging_capacity_bytes));
  kv_utilization_.Set(static_cast<double>(use.staged_bytes) /
                      static_cast<double>(std::max<int64_t>(1, use.staging_capacity_bytes)));
  device_bytes_.Set(static_cast<double>(use.device_bytes));
  resident_tokens_.Set(static_cast<double>(use.resident_tokens.used));
  resident_tokens_limit_.Set(static_cast<double>(use.resident_tokens.limit));
  recorded_layers_.Set(static_cast<double>(use.recorded_layers));
  prefix_cache_.Set(use.prefix_cache);
  tenants_.SetQueued(use.queued_of_tenants);
  ready_.Set(use.ready ? 1 : 0);
  live_.Set(use.live ? 1 : 0);
  progressing_.Set(use.progressing ? 1 : 0);
  drain_time_.Set(absl::ToDoubleSeconds(use.draining));
}

void Metrics::SetLimits(int64_t queued_tokens, absl::Duration drain) {
  queued_tokens_limit_.Set(static_cast<double>(queued_tokens));
  drain_timeout_.Set(absl::ToDoubleSeconds(drain));
}

}  // namespace prefilld::server
