#include "model/sparse/dense_strategy.h"

#include "model/sparse/attention_parts.h"
#include "proto/status_macros.h"

namespace prefilld::model {

DenseStrategy::DenseStrategy(Device* device, LayerPauses* pauses, int num_heads,
                             const uint32_t* pattern, int first_mark)
    : device_(*device), pauses_(*pauses), first_mark_(first_mark) {
  for (int head = 0; head < num_heads; ++head) {
    work_.push_back({.head = head, .pattern = pattern});
  }
}

void DenseStrategy::StartPrompt(int64_t num_tokens, const AttentionOptions&) {
  num_tokens_ = num_tokens;
}

absl::Status DenseStrategy::Attend(int layer, const kernels::AttentionParams& attention,
                                   LayerReport*) {
  AttentionParts parts(device_.traits(), &pauses_, attention, work_);
  PREFILLD_RETURN_IF_ERROR(device_.Mark(BeginMark(layer)));
  while (parts.Next()) {
    PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(parts.params()));
    if (!parts.is_all()) PREFILLD_RETURN_IF_ERROR(pauses_.Reach(LayerStage::kAttention));
  }
  return device_.Mark(DoneMark(layer));
}

absl::Status DenseStrategy::Report(LayerReport* report) {
  PREFILLD_ASSIGN_OR_RETURN(const double us,
                            device_.ElapsedUs(BeginMark(report->layer), DoneMark(report->layer)));
  report->attention_us = static_cast<int64_t>(us);
  report->dense_heads = report->num_queries < num_tokens_ ? 0 : static_cast<int>(work_.size());
  report->density = 1.0;
  return absl::OkStatus();
}

}  // namespace prefilld::model
