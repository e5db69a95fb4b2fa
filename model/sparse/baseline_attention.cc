#include "model/sparse/baseline_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <random>
#include <utility>

#include "model/device/stopwatch.h"
#include "model/sparse/sharing_decision.h"
#include "proto/status_macros.h"

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

absl::StatusOr<std::unique_ptr<BaselineWorkspace>> BaselineWorkspace::Create(
    Device* device, const ModelConfig* config, int64_t max_tokens, int block_tokens) {
  auto workspace = std::make_unique<BaselineWorkspace>(device, config, block_tokens);
  const int64_t heads = config->num_heads;
  const int64_t blocks = kernels::CeilDiv(max_tokens, block_tokens);
  const int64_t words = kernels::PatternWords(blocks);
  constexpr int64_t kFloat = sizeof(float);
  constexpr int64_t kWord = sizeof(uint32_t);
  const std::pair<DeviceBuffer&, int64_t> wanted[] = {
      {workspace->patterns, heads * blocks * words * kWord},
      {workspace->block_means, 2 * blocks * config->head_dim * kFloat},
      {workspace->block_mass, blocks * blocks * kFloat},
      {workspace->head_blocks, heads * int64_t{sizeof(int64_t)}},
  };
  for (const auto& [buffer, bytes] : wanted) {
    PREFILLD_ASSIGN_OR_RETURN(buffer, device->Allocate(static_cast<size_t>(bytes)));
  }
  PREFILLD_ASSIGN_OR_RETURN(
      workspace->head_estimate,
      HeadEstimate::Create(device, config->num_heads, max_tokens, block_tokens));
  PREFILLD_ASSIGN_OR_RETURN(workspace->audit, RecallAudit::Create(device, config->num_heads));
  workspace->sources.resize(heads);
  workspace->blocks.resize(heads);
  workspace->work.resize(heads);
  return workspace;
}

void BaselineAttention::StartPrompt(int64_t num_tokens, const AttentionOptions& options) {
  options_ = options;
  num_tokens_ = num_tokens;
  num_blocks_ = kernels::CeilDiv(num_tokens, scratch_.block_tokens);
}

absl::Status BaselineAttention::Attend(int layer, const kernels::AttentionParams& attention,
                                       LayerReport* report) {
  scratch_.estimate.resize(config_.num_heads * num_blocks_);
  scratch_.predicted.resize(num_blocks_);
  scratch_.random.resize(num_blocks_ * row_words());
  PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
  Stopwatch stopwatch;
  PREFILLD_RETURN_IF_ERROR(options_.policy == AttentionPolicy::kBaselineRandom
                               ? ChooseAtRandom(layer)
                               : ChooseByQuery(attention));
  for (int head = 0; head < config_.num_heads; ++head) {
    scratch_.work[head] = {.head = head, .pattern = Pattern(head)};
  }
  Summarize(report);
  report->pattern_us = stopwatch.LapUs();

  kernels::AttentionParams params = attention;
  params.work = scratch_.work.data();
  params.num_work = config_.num_heads;
  if (options_.recall_audit_rows > 0) {
    PREFILLD_RETURN_IF_ERROR(Audit(layer, params, report));
    report->audit_us = stopwatch.LapUs();
  }
  PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(params));
  PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
  report->attention_us = stopwatch.LapUs();
  return absl::OkStatus();
}

absl::Status BaselineAttention::ChooseAtRandom(int layer) {
  for (int head = 0; head < config_.num_heads; ++head) {
    const uint64_t seed = static_cast<uint64_t>(layer) * config_.num_heads + head;
    scratch_.blocks[head] =
        RandomPattern(num_blocks_, options_.density, seed, absl::MakeSpan(scratch_.random));
    scratch_.sources[head] = PatternSource::kBaseline;
    PREFILLD_RETURN_IF_ERROR(device_.Upload(Pattern(head), scratch_.random.data(),
                                            scratch_.random.size() * sizeof(uint32_t)));
  }
  return absl::OkStatus();
}

absl::Status BaselineAttention::ChooseByQuery(const kernels::AttentionParams& attention) {
  PREFILLD_RETURN_IF_ERROR(ChooseVerticalSlash(attention));
  for (int head = 0; head < config_.num_heads; ++head) {
    PREFILLD_RETURN_IF_ERROR(ChooseByBlockMeans(attention, head));
  }
  return device_.Download(scratch_.blocks.data(), scratch_.head_blocks.data(),
                          config_.num_heads * sizeof(int64_t));
}

// Chooses for all heads; those that block means predict get another pattern.
absl::Status BaselineAttention::ChooseVerticalSlash(const kernels::AttentionParams& attention) {
  PREFILLD_RETURN_IF_ERROR(scratch_.head_estimate->OfLastQueries(attention));
  PREFILLD_RETURN_IF_ERROR(scratch_.head_estimate->BuildVerticalSlash(
      options_.gamma_of_vertical_slash(), options_.min_budget_tokens, Pattern(0),
      scratch_.head_blocks.as<int64_t>()));
  return device_.Download(scratch_.estimate.data(), scratch_.head_estimate->block_mass().data(),
                          scratch_.estimate.size() * sizeof(float));
}

absl::Status BaselineAttention::ChooseByBlockMeans(const kernels::AttentionParams& attention,
                                                   int head) {
  auto* block_mass = scratch_.block_mass.as<float>();
  PREFILLD_RETURN_IF_ERROR(device_.ops().PooledMass({.q = attention.q,
                                                     .k = attention.k,
                                                     .num_tokens = num_tokens_,
                                                     .kv_head_stride = attention.kv_head_stride,
                                                     .num_heads = config_.num_heads,
                                                     .num_kv_heads = config_.num_kv_heads,
                                                     .head_dim = config_.head_dim,
                                                     .block_tokens = scratch_.block_tokens,
                                                     .scale = attention.scale,
                                                     .head = head,
                                                     .block_mass = block_mass,
                                                     .scratch = scratch_.block_means.as<float>()}));
  PREFILLD_RETURN_IF_ERROR(device_.Download(scratch_.predicted.data(),
                                            block_mass + (num_blocks_ - 1) * num_blocks_,
                                            num_blocks_ * sizeof(float)));
  const auto estimate =
      absl::MakeConstSpan(scratch_.estimate).subspan(head * num_blocks_, num_blocks_);
  if (JensenShannonDistance(scratch_.predicted, estimate) >= options_.tau) {
    scratch_.sources[head] = PatternSource::kVerticalSlash;
    return absl::OkStatus();
  }
  scratch_.sources[head] = PatternSource::kBaseline;
  PREFILLD_RETURN_IF_ERROR(device_.ops().SelectRows({.block_mass = block_mass,
                                                     .num_query_blocks = num_blocks_,
                                                     .num_key_blocks = num_blocks_,
                                                     .gamma = options_.gamma,
                                                     .pattern = Pattern(head)}));
  return device_.ops().MeasurePattern({.pattern = Pattern(head),
                                       .num_query_blocks = num_blocks_,
                                       .num_key_blocks = num_blocks_,
                                       .blocks = scratch_.head_blocks.as<int64_t>() + head});
}

absl::Status BaselineAttention::Audit(int layer, const kernels::AttentionParams& attention,
                                      LayerReport* report) {
  std::vector<float> recall(config_.num_heads);
  PREFILLD_RETURN_IF_ERROR(scratch_.audit->Measure(attention, layer, options_.recall_audit_rows,
                                                   *scratch_.head_estimate,
                                                   absl::MakeSpan(recall)));
  for (int head = 0; head < config_.num_heads; ++head) {
    report->recall.push_back({layer, head, scratch_.sources[head], recall[head]});
  }
  return absl::OkStatus();
}

void BaselineAttention::Summarize(LayerReport* report) const {
  const std::vector<PatternSource>& sources = scratch_.sources;
  report->baseline_heads =
      static_cast<int>(std::count(sources.begin(), sources.end(), PatternSource::kBaseline));
  report->vertical_slash_heads = config_.num_heads - report->baseline_heads;
  const double causal_blocks =
      static_cast<double>(num_blocks_) * static_cast<double>(num_blocks_ + 1) / 2;
  report->density = static_cast<double>(std::accumulate(scratch_.blocks.begin(),
                                                        scratch_.blocks.end(), int64_t{0})) /
                    (causal_blocks * config_.num_heads);
}

}  // namespace prefilld::model
