#include "model/sparse/head_estimate.h"

#include <algorithm>

#include "kernels/pattern.h"
#include "proto/status_macros.h"

namespace prefilld::model {

absl::StatusOr<std::unique_ptr<HeadEstimate>> HeadEstimate::Create(Device* device, int num_heads,
                                                                   int64_t max_tokens,
                                                                   int block_tokens) {
  std::unique_ptr<HeadEstimate> estimate(new HeadEstimate(device, num_heads, block_tokens));
  const int64_t heads = num_heads;
  const int64_t blocks = kernels::CeilDiv(max_tokens, block_tokens);
  const int64_t words = kernels::PatternWords(blocks);
  const struct {
    DeviceBuffer& buffer;
    int64_t bytes;
  } wanted[] = {
      {estimate->block_mass_, heads * blocks * int64_t{sizeof(float)}},
      {estimate->vertical_, heads * max_tokens * int64_t{sizeof(float)}},
      {estimate->slash_, heads * max_tokens * int64_t{sizeof(float)}},
      {estimate->scratch_, kernels::EstimateScratchBytes(num_heads, max_tokens, block_tokens)},
      {estimate->columns_, heads * words * int64_t{sizeof(uint32_t)}},
      {estimate->diagonals_, heads * words * int64_t{sizeof(uint32_t)}},
  };
  for (const auto& [buffer, bytes] : wanted) {
    PREFILLD_ASSIGN_OR_RETURN(buffer, device->Allocate(static_cast<size_t>(bytes)));
  }
  return estimate;
}

absl::Status HeadEstimate::OfLastQueries(const kernels::AttentionParams& attention) {
  const int64_t end = attention.num_keys;
  return OfQueries(attention, std::max(end - attention.num_queries, end - block_tokens_), end);
}

absl::Status HeadEstimate::OfQueries(const kernels::AttentionParams& attention, int64_t first,
                                     int64_t end) {
  num_keys_ = end;
  first_query_block_ = (attention.num_keys - attention.num_queries) / block_tokens_;
  kernels::EstimateParams params =
      kernels::EstimateInputs(attention, first, end, device_.traits().compute_dtype);
  params.block_mass = block_mass_.as<float>();
  params.vertical = vertical_.as<float>();
  params.slash = slash_.as<float>();
  params.scratch = scratch_.data();
  return device_.ops().Estimate(params);
}

absl::Status HeadEstimate::BuildVerticalSlash(float gamma, int64_t min_budget_tokens,
                                              uint32_t* patterns, int64_t* blocks) {
  return Build(0, num_heads_, gamma, min_budget_tokens, patterns, blocks);
}

absl::Status HeadEstimate::BuildVerticalSlashOf(int head, float gamma, int64_t min_budget_tokens,
                                                uint32_t* pattern) {
  return Build(head, 1, gamma, min_budget_tokens, pattern, /*blocks=*/nullptr);
}

absl::Status HeadEstimate::Build(int first, int count, float gamma, int64_t min_budget_tokens,
                                 uint32_t* patterns, int64_t* blocks) {
  PREFILLD_RETURN_IF_ERROR(
      device_.ops().VerticalSlash({.vertical = vertical_.as<float>() + first * num_keys_,
                                   .slash = slash_.as<float>() + first * num_keys_,
                                   .num_keys = num_keys_,
                                   .num_heads = count,
                                   .block_tokens = block_tokens_,
                                   .gamma = gamma,
                                   .min_budget_tokens = min_budget_tokens,
                                   .columns = columns_.as<uint32_t>(),
                                   .diagonals = diagonals_.as<uint32_t>()}));
  const int64_t num_blocks = kernels::CeilDiv(num_keys_, block_tokens_);
  return device_.ops().ExpandVerticalSlash({.columns = columns_.as<uint32_t>(),
                                            .diagonals = diagonals_.as<uint32_t>(),
                                            .num_query_blocks = num_blocks - first_query_block_,
                                            .num_key_blocks = num_blocks,
                                            .pattern = patterns,
                                            .num_heads = count,
                                            .blocks = blocks});
}

}  // namespace prefilld::model
