#include "model/sparse/baseline_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>

#include "model/device/stopwatch.h"
#include "model/sparse/sharing_decision.h"

namespace prefilld::model {
namespace {

void SetBit(absl::Span<uint32_t> row, int64_t block) {
  row[block / 32] |= uint32_t{1} << (block % 32);
}

}  // namespace

int64_t RandomPattern(int64_t num_blocks, float density, uint64_t seed,
                      absl::Span<uint32_t> pattern) {
  const int64_t words = kernels::PatternWords(num_blocks);
  std::mt19937_64 random(seed);
  std::vector<int64_t> between;  // the blocks between block 0 and the diagonal
  int64_t count = 0;
  std::fill(pattern.begin(), pattern.end(), 0u);
  for (int64_t row = 0; row < num_blocks; ++row) {
    const absl::Span<uint32_t> bits = pattern.subspan(row * words, words);
    SetBit(bits, 0);
    SetBit(bits, row);
    between.resize(std::max<int64_t>(0, row - 1));
    std::iota(between.begin(), between.end(), int64_t{1});
    const int64_t forced = row == 0 ? 1 : 2;
    const int64_t wanted = std::llround(density * static_cast<double>(row + 1)) - forced;
    const int64_t drawn = std::clamp<int64_t>(wanted, 0, static_cast<int64_t>(between.size()));
    for (int64_t i = 0; i < drawn; ++i) {
      std::uniform_int_distribution<int64_t> rest(i, static_cast<int64_t>(between.size()) - 1);
      std::swap(between[i], between[rest(random)]);
      SetBit(bits, between[i]);
    }
    count += forced + drawn;
  }
  return count;
}

absl::StatusOr<std::unique_ptr<BaselineAttention>> BaselineAttention::Create(
    Device* device, const ModelConfig* config, int64_t max_tokens, int block_tokens) {
  std::unique_ptr<BaselineAttention> baseline(new BaselineAttention(device, config, block_tokens));
  if (absl::Status status = baseline->Allocate(max_tokens); !status.ok()) return status;
  return baseline;
}

absl::Status BaselineAttention::Allocate(int64_t max_tokens) {
  const int64_t heads = config_.num_heads;
  const int64_t blocks = kernels::CeilDiv(max_tokens, block_tokens_);
  const int64_t words = kernels::PatternWords(blocks);
  constexpr int64_t kFloat = sizeof(float);
  constexpr int64_t kWord = sizeof(uint32_t);
  const struct {
    DeviceBuffer& buffer;
    int64_t bytes;
  } wanted[] = {
      {patterns_, heads * blocks * words * kWord},
      {block_means_, 2 * blocks * config_.head_dim * kFloat},
      {block_mass_, blocks * blocks * kFloat},
      {head_blocks_, heads * int64_t{sizeof(int64_t)}},
  };
  for (const auto& [buffer, bytes] : wanted) {
    absl::StatusOr<DeviceBuffer> allocated = device_.Allocate(static_cast<size_t>(bytes));
    if (!allocated.ok()) return allocated.status();
    buffer = *std::move(allocated);
  }
  absl::StatusOr<std::unique_ptr<HeadEstimate>> head_estimate =
      HeadEstimate::Create(&device_, config_.num_heads, max_tokens, block_tokens_);
  if (!head_estimate.ok()) return head_estimate.status();
  head_estimate_ = *std::move(head_estimate);
  absl::StatusOr<std::unique_ptr<RecallAudit>> audit =
      RecallAudit::Create(&device_, config_.num_heads);
  if (!audit.ok()) return audit.status();
  audit_ = *std::move(audit);
  sources_.resize(heads);
  blocks_.resize(heads);
  work_.resize(heads);
  return absl::OkStatus();
}

void BaselineAttention::StartPrompt(int64_t num_tokens, const AttentionOptions& options) {
  options_ = options;
  num_tokens_ = num_tokens;
  num_blocks_ = kernels::CeilDiv(num_tokens, block_tokens_);
  estimate_.resize(config_.num_heads * num_blocks_);
  predicted_.resize(num_blocks_);
  random_pattern_.resize(num_blocks_ * row_words());
}

absl::Status BaselineAttention::Attend(int layer, const kernels::AttentionParams& attention,
                                       LayerReport* report) {
  Stopwatch stopwatch;
  absl::Status status = options_.policy == AttentionPolicy::kBaselineRandom
                            ? ChooseAtRandom(layer)
                            : ChooseByQuery(attention);
  if (!status.ok()) return status;
  for (int head = 0; head < config_.num_heads; ++head) {
    work_[head] = {.head = head, .pattern = Pattern(head)};
  }
  Summarize(report);
  report->pattern_us = stopwatch.LapUs();

  kernels::AttentionParams params = attention;
  params.work = work_.data();
  params.num_work = config_.num_heads;
  if (options_.recall_audit_rows > 0) {
    if (status = Audit(layer, params, report); !status.ok()) return status;
    report->audit_us = stopwatch.LapUs();
  }
  status = device_.ops().Attention(params);
  if (status.ok()) status = device_.Synchronize();
  report->attention_us = stopwatch.LapUs();
  return status;
}

absl::Status BaselineAttention::ChooseAtRandom(int layer) {
  for (int head = 0; head < config_.num_heads; ++head) {
    const uint64_t seed = static_cast<uint64_t>(layer) * config_.num_heads + head;
    blocks_[head] =
        RandomPattern(num_blocks_, options_.density, seed, absl::MakeSpan(random_pattern_));
    sources_[head] = PatternSource::kBaseline;
    absl::Status status = device_.Upload(Pattern(head), random_pattern_.data(),
                                         random_pattern_.size() * sizeof(uint32_t));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status BaselineAttention::ChooseByQuery(const kernels::AttentionParams& attention) {
  absl::Status status = ChooseVerticalSlash(attention);
  for (int head = 0; head < config_.num_heads && status.ok(); ++head) {
    status = ChooseByBlockMeans(attention, head);
  }
  if (!status.ok()) return status;
  return device_.Download(blocks_.data(), head_blocks_.data(), config_.num_heads * sizeof(int64_t));
}

// For all heads; those that block means predict get another pattern.
absl::Status BaselineAttention::ChooseVerticalSlash(const kernels::AttentionParams& attention) {
  absl::Status status = head_estimate_->OfLastQueries(attention);
  if (status.ok()) {
    status = head_estimate_->BuildVerticalSlash(options_.gamma_of_vertical_slash(),
                                                options_.min_budget_tokens, Pattern(0),
                                                head_blocks_.as<int64_t>());
  }
  if (!status.ok()) return status;
  return device_.Download(estimate_.data(), head_estimate_->block_mass().data(),
                          estimate_.size() * sizeof(float));
}

absl::Status BaselineAttention::ChooseByBlockMeans(const kernels::AttentionParams& attention,
                                                   int head) {
  absl::Status status = device_.ops().PooledMass({.q = attention.q,
                                                  .k = attention.k,
                                                  .num_tokens = num_tokens_,
                                                  .kv_head_stride = attention.kv_head_stride,
                                                  .num_heads = config_.num_heads,
                                                  .num_kv_heads = config_.num_kv_heads,
                                                  .head_dim = config_.head_dim,
                                                  .block_tokens = block_tokens_,
                                                  .scale = attention.scale,
                                                  .head = head,
                                                  .block_mass = block_mass_.as<float>(),
                                                  .scratch = block_means_.as<float>()});
  if (status.ok()) {
    status = device_.Download(predicted_.data(),
                              block_mass_.as<float>() + (num_blocks_ - 1) * num_blocks_,
                              num_blocks_ * sizeof(float));
  }
  if (!status.ok()) return status;
  const auto estimate = absl::MakeConstSpan(estimate_).subspan(head * num_blocks_, num_blocks_);
  if (JensenShannonDistance(predicted_, estimate) >= options_.tau) {
    sources_[head] = PatternSource::kVerticalSlash;
    return absl::OkStatus();
  }
  sources_[head] = PatternSource::kBaseline;
  status = device_.ops().SelectRows({.block_mass = block_mass_.as<float>(),
                                     .num_query_blocks = num_blocks_,
                                     .num_key_blocks = num_blocks_,
                                     .gamma = options_.gamma,
                                     .pattern = Pattern(head)});
  if (!status.ok()) return status;
  return device_.ops().MeasurePattern({.pattern = Pattern(head),
                                       .num_query_blocks = num_blocks_,
                                       .num_key_blocks = num_blocks_,
                                       .blocks = head_blocks_.as<int64_t>() + head});
}

absl::Status BaselineAttention::Audit(int layer, const kernels::AttentionParams& attention,
                                      LayerReport* report) {
  std::vector<float> recall(config_.num_heads);
  absl::Status status = audit_->Measure(attention, layer, options_.recall_audit_rows,
                                        *head_estimate_, absl::MakeSpan(recall));
  for (int head = 0; head < config_.num_heads && status.ok(); ++head) {
    report->recall.push_back({layer, head, sources_[head], recall[head]});
  }
  return status;
}

void BaselineAttention::Summarize(LayerReport* report) const {
  report->baseline_heads =
      static_cast<int>(std::count(sources_.begin(), sources_.end(), PatternSource::kBaseline));
  report->vertical_slash_heads = config_.num_heads - report->baseline_heads;
  const double causal_blocks =
      static_cast<double>(num_blocks_) * static_cast<double>(num_blocks_ + 1) / 2;
  report->density =
      static_cast<double>(std::accumulate(blocks_.begin(), blocks_.end(), int64_t{0})) /
      (causal_blocks * config_.num_heads);
}

}  // namespace prefilld::model
