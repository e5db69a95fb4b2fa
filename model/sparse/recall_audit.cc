#include "model/sparse/recall_audit.h"

#include <algorithm>
#include <cmath>

#include "kernels/pattern.h"
#include "model/sparse/head_estimate.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

// The multiples of this number, modulo 1, spread evenly over [0, 1), however many there are.
constexpr double kGoldenRatio = 0.6180339887498949;

}  // namespace

RecallSummary Summarize(absl::Span<const HeadRecall> heads) {
  RecallSummary summary;
  std::vector<float> sorted;
  sorted.reserve(heads.size());
  for (const HeadRecall& head : heads) {
    sorted.push_back(head.recall);
    summary.mean += head.recall / static_cast<double>(heads.size());
  }
  const size_t rank = (heads.size() + 19) / 20;  // counted from 1
  std::nth_element(sorted.begin(), sorted.begin() + (rank - 1), sorted.end());
  summary.fifth_percentile = sorted[rank - 1];
  summary.lowest = *std::min_element(
      heads.begin(), heads.end(),
      [](const HeadRecall& a, const HeadRecall& b) { return a.recall < b.recall; });
  return summary;
}

std::vector<int64_t> AuditedRows(int64_t num_blocks, int64_t num_rows, int layer) {
  num_rows = std::min(num_rows, num_blocks);
  const double stretch = static_cast<double>(num_blocks) / static_cast<double>(num_rows);
  const double place = std::fmod(kGoldenRatio * (layer + 1), 1.0);
  std::vector<int64_t> rows;
  rows.reserve(num_rows);
  for (int64_t i = 0; i < num_rows; ++i) {
    const auto row = static_cast<int64_t>((static_cast<double>(i) + place) * stretch);
    rows.push_back(std::min(row, num_blocks - 1));
  }
  return rows;
}

absl::StatusOr<std::unique_ptr<RecallAudit>> RecallAudit::Create(Device* device, int num_heads) {
  std::unique_ptr<RecallAudit> audit(new RecallAudit(device, num_heads));
  PREFILLD_ASSIGN_OR_RETURN(audit->figures_,
                            device->Allocate(num_heads * (sizeof(double) + sizeof(int64_t))));
  audit->mass_.resize(num_heads);
  audit->mass_times_queries_.resize(num_heads);
  return audit;
}

absl::Status RecallAudit::Measure(const kernels::AttentionParams& attention, int layer,
                                  int64_t num_rows, HeadEstimate& estimate,
                                  absl::Span<float> recall) {
  const int64_t num_blocks = kernels::CeilDiv(attention.num_keys, attention.block_tokens);
  std::fill(mass_times_queries_.begin(), mass_times_queries_.end(), 0.0);
  int64_t num_queries = 0;
  for (const int64_t row : AuditedRows(num_blocks, num_rows, layer)) {
    PREFILLD_RETURN_IF_ERROR(MeasureRow(attention, row, estimate));
    PREFILLD_RETURN_IF_ERROR(
        device_.Download(mass_.data(), figures_.data(), num_heads_ * sizeof(double)));
    const int64_t in_row = std::min<int64_t>(attention.block_tokens,
                                             attention.num_keys - row * attention.block_tokens);
    num_queries += in_row;
    for (int i = 0; i < attention.num_work; ++i) {
      mass_times_queries_[i] += mass_[i] * static_cast<double>(in_row);
    }
  }
  for (int i = 0; i < attention.num_work; ++i) {
    const double mean = mass_times_queries_[i] / static_cast<double>(num_queries);
    recall[i] =
        attention.work[i].pattern == nullptr ? 1.0f : std::min(static_cast<float>(mean), 1.0f);
  }
  return absl::OkStatus();
}

// Measures the row's queries as if the prompt ended with them.
absl::Status RecallAudit::MeasureRow(const kernels::AttentionParams& attention, int64_t row,
                                     HeadEstimate& estimate) {
  const int64_t num_blocks = kernels::CeilDiv(attention.num_keys, attention.block_tokens);
  const int64_t first = row * attention.block_tokens;
  const int64_t end = std::min(first + attention.block_tokens, attention.num_keys);
  PREFILLD_RETURN_IF_ERROR(estimate.OfQueries(attention, first, end));
  const int64_t pattern_offset = row * kernels::PatternWords(num_blocks);
  for (int i = 0; i < attention.num_work; ++i) {
    const kernels::HeadWork& work = attention.work[i];
    if (work.pattern == nullptr) continue;
    // The row's pattern has no block beyond its diagonal, where the block mass of the estimate
    // ends.
    PREFILLD_RETURN_IF_ERROR(device_.ops().MeasurePattern(
        {.block_mass = estimate.block_mass().as<float>() + work.head * (row + 1),
         .pattern = work.pattern + pattern_offset,
         .last_row = row + 1 == num_blocks ? work.last_row : nullptr,
         .num_query_blocks = 1,
         .num_key_blocks = row + 1,
         .mass = figures_.as<double>() + i,
         .blocks = figures_.as<int64_t>() + num_heads_ + i}));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::model
