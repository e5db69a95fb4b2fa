#include "model/prefill/crossover.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/device/stopwatch.h"
#include "model/prefill/engine_parts.h"
#include "model/prefill/prompt_state.h"
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

// Dense attention is run so often without a wait in between, where the device computes ahead.
constexpr int kDenseRuns = 4;
// A prime, so that no two rows of a tensor are equal.
constexpr size_t kNoiseValues = 65'537;

// The masses of noise are nearly equal. So the score threshold is the part of each row's blocks
// that a head computes, beside the first one, the diagonal, and a column and a diagonal of the last
// queries.
AttentionOptions OptionsOfDensity(AttentionOptions options) {
  options.policy = AttentionPolicy::kShare;
  options.coverage = 0.0f;  // no pivots: every head is scored, which costs most
  options.score_threshold = 0.4f;
  options.last_rows_gamma = 1e-6f;
  options.min_budget_tokens = 0;
  options.recall_audit_rows = 0;
  return options;
}

// Returns noise of variance 1 in the compute dtype, which is fp32 or bf16.
std::vector<char> Noise(kernels::DType dtype) {
  const size_t element = kernels::SizeOf(dtype);
  std::vector<char> noise(kNoiseValues * element);
  std::minstd_rand random(1);
  std::uniform_real_distribution<float> uniform(-1.732f, 1.732f);
  for (size_t i = 0; i < kNoiseValues; ++i) {
    const float value = uniform(random);
    // bf16 is the upper half of fp32, and all are little-endian.
    std::memcpy(&noise[i * element],
                reinterpret_cast<const char*>(&value) + sizeof(value) - element, element);
  }
  return noise;
}

// Runs both ways of attention over noise.
class Contest {
 public:
  Contest(SharingWorkspace* workspace, const kernels::AttentionParams& attention,
          PatternSharing* sharing, const AttentionOptions& options)
      : device_(workspace->device),
        attention_(attention),
        sharing_(*sharing),
        options_(OptionsOfDensity(options)),
        noise_(Noise(device_.traits().compute_dtype)) {
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
      PREFILLD_ASSIGN_OR_RETURN(const double share_us, TimeShare(&times.density));
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
    PREFILLD_RETURN_IF_ERROR(Fill(attention_.q, 0, head_bytes * attention_.num_heads));
    for (int head = 0; head < attention_.num_kv_heads; ++head) {
      const int64_t first = head * attention_.kv_head_stride * element;
      PREFILLD_RETURN_IF_ERROR(Fill(attention_.k, first, head_bytes));
      PREFILLD_RETURN_IF_ERROR(Fill(attention_.v, first, head_bytes));
    }
    return absl::OkStatus();
  }

  absl::Status Fill(const void* tensor, int64_t first_byte, int64_t bytes) {
    char* to = static_cast<char*>(const_cast<void*>(tensor)) + first_byte;
    const auto most = static_cast<int64_t>(noise_.size());
    for (int64_t done = 0; done < bytes; done += most) {
      PREFILLD_RETURN_IF_ERROR(device_.Upload(to + done, noise_.data(),
                                              static_cast<size_t>(std::min(most, bytes - done))));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<double> TimeDense() {
    kernels::AttentionParams params = attention_;
    params.work = dense_.data();
    params.num_work = static_cast<int>(dense_.size());
    const int runs = device_.traits().asynchronous ? kDenseRuns : 1;
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    Stopwatch stopwatch;
    for (int run = 0; run < runs; ++run) {
      PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(params));
    }
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    return static_cast<double>(stopwatch.LapUs()) / runs;
  }

  absl::StatusOr<double> TimeShare(double* density) {
    LayerReport report;
    report.num_queries = attention_.num_queries;
    sharing_.StartPrompt(attention_.num_queries, options_);
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    Stopwatch stopwatch;
    PREFILLD_RETURN_IF_ERROR(sharing_.Attend(/*layer=*/0, attention_, &report));
    PREFILLD_RETURN_IF_ERROR(sharing_.Report(&report));
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    *density = report.density;
    return static_cast<double>(stopwatch.LapUs());
  }

  Device& device_;
  kernels::AttentionParams attention_;
  PatternSharing& sharing_;
  const AttentionOptions options_;
  const std::vector<char> noise_;
  std::vector<kernels::HeadWork> dense_;
};

bool ShareIsFaster(const AttentionTimes& times) { return times.share_us <= times.dense_us; }

void LogCrossover(absl::Span<const AttentionTimes> measured, int64_t crossover, int64_t max_tokens,
                  int64_t taken_ms) {
  if (measured.empty()) {
    spdlog::info("policy auto: dense at every length; prompts are too short to measure share");
    return;
  }
  const AttentionTimes& last = measured.back();
  const std::string from =
      crossover > max_tokens
          ? "dense at every length, as share was not faster"
          : absl::StrCat("dense below ", crossover, " tokens, share from there on",
                         crossover > last.num_tokens ? ", which is estimated" : "");
  spdlog::info(
      "policy auto: {}; measured up to {} tokens in {} ms: share takes {:.2f} of dense attention's "
      "time at a density of {:.2f}",
      from, last.num_tokens, taken_ms, last.share_us / last.dense_us, last.density);
}

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

absl::StatusOr<std::vector<AttentionTimes>> MeasureAttention(
    SharingWorkspace* workspace, PatternSharing* sharing, const kernels::AttentionParams& attention,
    const AttentionOptions& options) {
  Contest contest(workspace, attention, sharing, options);
  std::vector<AttentionTimes> measured;
  int64_t taken_us = 0;
  Stopwatch stopwatch;
  // The next length takes about four times as long as the last one.
  for (int64_t n = kFirstTokens, last_us = 0;
       n <= attention.num_keys && taken_us + 4 * last_us < kMostUs; n *= 2) {
    PREFILLD_ASSIGN_OR_RETURN(const AttentionTimes times, contest.Measure(n));
    measured.push_back(times);
    last_us = stopwatch.LapUs();
    taken_us += last_us;
    spdlog::debug("attention of {} tokens: dense {:.0f} us, share {:.0f} us at a density of {:.2f}",
                  n, times.dense_us, times.share_us, times.density);
    if (ShareIsFaster(times)) break;
  }
  return measured;
}

absl::StatusOr<int64_t> MeasureCrossover(EngineParts& parts) {
  const ModelConfig& config = parts.info.config;
  const int64_t max_tokens = parts.info.max_tokens;
  PromptState& state = parts.states.largest();
  const int64_t q_width = int64_t{config.num_heads} * config.head_dim;
  const int64_t room =
      std::min({max_tokens, state.max_tokens, state.max_tokens * config.hidden / q_width});
  Stopwatch stopwatch;
  PREFILLD_ASSIGN_OR_RETURN(const KvSlot slot, state.slots->Acquire(/*layer=*/0));
  const absl::StatusOr<std::vector<AttentionTimes>> measured = MeasureAttention(
      parts.sharing.get(), state.sharing.get(),
      {.q = parts.step->queries(),
       .k = slot.k,
       .v = slot.v,
       .out = state.hidden.values.data(),
       .num_queries = room,
       .num_keys = room,
       .kv_head_stride = RoundUp(state.max_tokens, kKvStrideTokens) * config.head_dim,
       .num_heads = config.num_heads,
       .num_kv_heads = config.num_kv_heads,
       .head_dim = config.head_dim,
       .block_tokens = parts.block_tokens,
       .scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim))},
      parts.info.default_attention);
  state.slots->Release(/*layer=*/0);
  PREFILLD_RETURN_IF_ERROR(measured.status());
  const int64_t crossover = CrossoverOf(*measured, max_tokens);
  LogCrossover(*measured, crossover, max_tokens, stopwatch.LapUs() / 1000);
  return crossover;
}

}  // namespace prefilld::model
