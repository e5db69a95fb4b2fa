#include "model/prefill/crossover.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/device/stopwatch.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

constexpr int64_t kFirstTokens = 512;
constexpr int64_t kMostUs = 3'000'000;  // for all lengths together
// Both ways take turns, and of each the fastest run counts, so that other work on the machine
// decides nothing. There are so many turns after a first that does not count, or as many as fit
// into this time, but at least two.
constexpr int kTurns = 10;
constexpr int64_t kTurnsUs = 200'000;
// The part of dense attention that share takes of long prompts, for a guess beyond what was
// measured: scores are a tenth of it, and the rest is more than prompts need.
constexpr double kLastingShare = 0.75;

// With queries and keys of zeros all masses are equal, and the first ones are chosen. So these
// thresholds are the part of each row's blocks that a head computes, beside the diagonal.
AttentionOptions OptionsOfDensity(AttentionOptions options) {
  options.policy = AttentionPolicy::kShare;
  options.coverage = 0.0f;  // no pivots: every head is scored, which costs most
  options.score_threshold = 0.4f;
  options.last_rows_gamma = 1e-6f;
  options.min_budget_tokens = 0;
  options.recall_audit_rows = 0;
  return options;
}

// Runs both ways of attention over zeros.
class Contest {
 public:
  Contest(SharingWorkspace* workspace, const kernels::AttentionParams& attention,
          PatternSharing* sharing, const AttentionOptions& options)
      : device_(workspace->device),
        attention_(attention),
        sharing_(*sharing),
        options_(OptionsOfDensity(options)) {
    for (int head = 0; head < attention.num_heads; ++head) dense_.push_back({.head = head});
  }

  absl::StatusOr<AttentionTimes> Measure(int64_t num_tokens) {
    PREFILLD_RETURN_IF_ERROR(SetLength(num_tokens));
    AttentionTimes times = {.num_tokens = num_tokens,
                            .dense_us = std::numeric_limits<double>::infinity(),
                            .share_us = std::numeric_limits<double>::infinity()};
    int64_t taken_us = 0;
    Stopwatch stopwatch;
    for (int turn = 0; turn <= kTurns && (turn <= 2 || taken_us < kTurnsUs); ++turn) {
      PREFILLD_ASSIGN_OR_RETURN(const double dense_us, TimeDense());
      PREFILLD_ASSIGN_OR_RETURN(const double share_us, TimeShare());
      taken_us += stopwatch.LapUs();
      if (turn == 0) continue;
      times.dense_us = std::min(times.dense_us, dense_us);
      times.share_us = std::min(times.share_us, share_us);
    }
    return times;
  }

 private:
  absl::Status SetLength(int64_t num_tokens) {
    attention_.num_queries = attention_.num_keys = num_tokens;
    const auto element = static_cast<int64_t>(kernels::SizeOf(device_.traits().compute_dtype));
    const int64_t head_bytes = num_tokens * attention_.head_dim * element;
    const std::vector<char> zeros(static_cast<size_t>(head_bytes * attention_.num_heads));
    PREFILLD_RETURN_IF_ERROR(
        device_.Upload(const_cast<void*>(attention_.q), zeros.data(), zeros.size()));
    for (int head = 0; head < attention_.num_kv_heads; ++head) {
      const int64_t first = head * attention_.kv_head_stride * element;
      for (const void* tensor : {attention_.k, attention_.v}) {
        PREFILLD_RETURN_IF_ERROR(
            device_.Upload(static_cast<char*>(const_cast<void*>(tensor)) + first, zeros.data(),
                           static_cast<size_t>(head_bytes)));
      }
    }
    return absl::OkStatus();
  }

  absl::StatusOr<double> TimeDense() {
    kernels::AttentionParams params = attention_;
    params.work = dense_.data();
    params.num_work = static_cast<int>(dense_.size());
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    Stopwatch stopwatch;
    PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(params));
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    return static_cast<double>(stopwatch.LapUs());
  }

  absl::StatusOr<double> TimeShare() {
    LayerReport report;
    report.num_queries = attention_.num_queries;
    sharing_.StartPrompt(attention_.num_queries, options_);
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    Stopwatch stopwatch;
    PREFILLD_RETURN_IF_ERROR(sharing_.Attend(/*layer=*/0, attention_, &report));
    PREFILLD_RETURN_IF_ERROR(sharing_.Report(&report));
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    return static_cast<double>(stopwatch.LapUs());
  }

  Device& device_;
  kernels::AttentionParams attention_;
  PatternSharing& sharing_;
  const AttentionOptions options_;
  std::vector<kernels::HeadWork> dense_;
};

bool ShareIsFaster(const AttentionTimes& times) { return times.share_us <= times.dense_us; }

}  // namespace

int64_t CrossoverOf(absl::Span<const AttentionTimes> measured, int64_t max_tokens) {
  if (measured.empty()) return max_tokens + 1;
  const auto first = std::find_if(measured.begin(), measured.end(), ShareIsFaster);
  if (first == measured.begin()) return first->num_tokens;
  const AttentionTimes& before = *(first - 1);
  const double ratio_before = before.share_us / before.dense_us;
  double times_longer;  // than `before`
  if (first == measured.end()) {
    times_longer = std::sqrt((ratio_before - kLastingShare) / (1.0 - kLastingShare));
  } else {
    const double ratio = first->share_us / first->dense_us;
    const double way = (ratio_before - 1.0) / (ratio_before - ratio);
    times_longer = std::pow(
        static_cast<double>(first->num_tokens) / static_cast<double>(before.num_tokens), way);
  }
  const double crossover = std::ceil(static_cast<double>(before.num_tokens) * times_longer);
  return static_cast<int64_t>(std::min(crossover, static_cast<double>(max_tokens + 1)));
}

absl::StatusOr<int64_t> MeasureCrossover(SharingWorkspace* workspace, PatternSharing* sharing,
                                         const kernels::AttentionParams& attention,
                                         const AttentionOptions& options) {
  const int64_t max_tokens = attention.num_keys;
  Contest contest(workspace, attention, sharing, options);
  std::vector<AttentionTimes> measured;
  int64_t taken_us = 0;
  Stopwatch stopwatch;
  // The next length takes about four times as long as the last one.
  for (int64_t n = kFirstTokens, last_us = 0; n <= max_tokens && taken_us + 4 * last_us < kMostUs;
       n *= 2) {
    PREFILLD_ASSIGN_OR_RETURN(const AttentionTimes times, contest.Measure(n));
    measured.push_back(times);
    last_us = stopwatch.LapUs();
    taken_us += last_us;
    spdlog::debug("attention of {} tokens: dense {:.0f} us, share {:.0f} us", n, times.dense_us,
                  times.share_us);
    if (ShareIsFaster(times)) break;
  }
  const int64_t crossover = CrossoverOf(measured, max_tokens);
  const std::string measured_up_to = absl::StrCat(measured.empty() ? 0 : measured.back().num_tokens,
                                                  " tokens in ", taken_us / 1000, " ms");
  if (measured.empty()) {
    spdlog::info("policy auto: dense at every length; prompts are too short to measure share");
  } else if (crossover > max_tokens) {
    spdlog::info("policy auto: dense at every length, as share was not faster (measured up to {})",
                 measured_up_to);
  } else {
    const bool estimated = crossover > measured.back().num_tokens;
    spdlog::info("policy auto: dense below {} tokens, share from there on ({}measured up to {})",
                 crossover, estimated ? "estimated; " : "", measured_up_to);
  }
  return crossover;
}

}  // namespace prefilld::model
