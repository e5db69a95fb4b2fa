#include "model/sparse/scored_patterns.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

// Counts the first heads that are numbered without a gap, and whose patterns of `words` words lie
// one behind the other.
size_t RunLength(absl::Span<const ScoredHead> heads, int64_t words) {
  size_t length = 1;
  while (length < heads.size() && heads[length].head == heads[length - 1].head + 1 &&
         heads[length].pattern == heads[length - 1].pattern + words) {
    ++length;
  }
  return length;
}

// Returns the first heads, at most `most` of them. If there are more, those that share a KV head
// stay together where they can, because its keys are prepared once for all of them.
absl::Span<const ScoredHead> FirstGroup(absl::Span<const ScoredHead> heads, int64_t most,
                                        int heads_per_kv_head) {
  const auto kv_head = [&](size_t i) { return heads[i].head / heads_per_kv_head; };
  const auto count = static_cast<size_t>(std::min(most, static_cast<int64_t>(heads.size())));
  if (count == heads.size()) return heads;
  size_t whole = count;
  while (whole > 0 && kv_head(whole - 1) == kv_head(whole)) --whole;
  return heads.subspan(0, whole > 0 ? whole : count);
}

}  // namespace

absl::Status AddScoredBlocks(SharingWorkspace& scratch, const kernels::AttentionParams& attention,
                             absl::Span<const ScoredHead> heads, const AttentionOptions& options) {
  Ops& ops = scratch.device.ops();
  const int64_t n = kernels::CeilDiv(attention.num_keys, attention.block_tokens);
  const int64_t first_row = (attention.num_keys - attention.num_queries) / attention.block_tokens;
  const int64_t rows = n - first_row;
  const int64_t words = rows * kernels::PatternWords(n);
  const int between_pauses = HeadsBetweenPauses(scratch.device.traits(), attention);
  const int64_t most = std::min<int64_t>(between_pauses, scratch.MassesAtATime(rows, n));
  while (!heads.empty()) {
    const auto group = FirstGroup(heads, most, attention.num_heads / attention.num_kv_heads);
    heads.remove_prefix(group.size());
    std::vector<int> numbers;
    for (const ScoredHead& scored : group) numbers.push_back(scored.head);
    PREFILLD_RETURN_IF_ERROR(
        ops.AntidiagonalScores({.q = attention.q,
                                .k = attention.k,
                                .num_queries = attention.num_queries,
                                .num_keys = attention.num_keys,
                                .kv_head_stride = attention.kv_head_stride,
                                .num_heads = attention.num_heads,
                                .num_kv_heads = attention.num_kv_heads,
                                .head_dim = attention.head_dim,
                                .block_tokens = attention.block_tokens,
                                .stride = static_cast<int>(options.score_stride),
                                .scale = attention.scale,
                                .heads = numbers.data(),
                                .num_scored = static_cast<int>(group.size()),
                                .block_mass = scratch.block_mass.as<float>()}));
    for (size_t first = 0; first < group.size();) {
      const auto run = group.subspan(first, RunLength(group.subspan(first), words));
      PREFILLD_RETURN_IF_ERROR(ops.SelectRows(
          {.block_mass = scratch.block_mass.as<float>() + static_cast<int64_t>(first) * rows * n,
           .num_query_blocks = rows,
           .num_key_blocks = n,
           .gamma = options.score_threshold,
           .pattern = run.front().pattern,
           .num_heads = static_cast<int>(run.size()),
           .join = true,
           .blocks = scratch.figures.as<int64_t>() + scratch.OwnBlocksSlot(run.front().head)}));
      first += run.size();
    }
    if (between_pauses < attention.num_heads) {
      PREFILLD_RETURN_IF_ERROR(scratch.Pause(LayerStage::kPatterns));
    }
  }
  return absl::OkStatus();
}

}  // namespace prefilld::model
