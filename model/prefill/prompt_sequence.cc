#include "model/prefill/prompt_sequence.h"

#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/dtype.h"

namespace prefilld::model {
namespace {

// Points on the device's time line, behind those of pattern sharing; twice, as two layers may be
// under way.
enum Point { kLayerBegins, kLayerDone, kDenseBegins, kDenseDone, kNumPoints };
static_assert(PatternSharing::kNumMarks + 2 * kNumPoints <= Device::kNumMarks);

int MarkOf(Point point, int layer) { return PatternSharing::kNumMarks + 2 * point + layer % 2; }

}  // namespace

PromptSequence::PromptSequence(EngineParts* parts, PackedPrompts prompts,
                               const AttentionOptions& options, bool logprobs)
    : parts_(*parts),
      prompts_(std::move(prompts)),
      policy_(options.policy),
      logprobs_(logprobs),
      all_of_last_layer_(logprobs || is_batch() || prompts_.places().front().count == 1) {
  if (IsBaseline(policy_)) {
    parts_.baseline->StartPrompt(num_tokens(), options);
  } else if (policy_ != AttentionPolicy::kDense) {
    parts_.sharing->StartPrompt(num_tokens(), options);
  }
}

// A layer that is still being computed is overwritten by none but work queued behind it.
PromptSequence::~PromptSequence() {
  parts_.slots->ReleaseAll();
  parts_.busy = false;
}

absl::StatusOr<LayerReport> PromptSequence::RunLayer() {
  if (!failure_.ok()) return failure_;
  if (next_layer_ == config().num_layers) {
    return absl::FailedPreconditionError(absl::StrCat("all ", next_layer_, " layers are computed"));
  }
  LayerReport report;
  report.layer = next_layer_;
  if (started_layers_ == next_layer_) {
    absl::StatusOr<KvSlot> slot = parts_.slots->Acquire(next_layer_);
    if (!slot.ok()) return slot.status();
    failure_ = StartLayer(next_layer_, *slot, &report);
  }
  if (failure_.ok()) failure_ = StartNextAhead();
  if (failure_.ok()) failure_ = FinishLayer(&report);
  if (!failure_.ok()) return failure_;
  parts_.slots->MarkComputed(next_layer_++);
  return report;
}

absl::Status PromptSequence::StartNextAhead() {
  const bool may = policy_ == AttentionPolicy::kDense && num_tokens() <= parts_.run_ahead_tokens &&
                   started_layers_ < config().num_layers && parts_.slots->HasFree();
  if (!may) return absl::OkStatus();
  const int layer = started_layers_;
  absl::StatusOr<KvSlot> slot = parts_.slots->Acquire(layer);
  if (!slot.ok()) return slot.status();
  LayerReport nothing_to_report;  // as long as nothing but its time is known of dense attention
  return StartLayer(layer, *slot, &nothing_to_report);
}

absl::Status PromptSequence::StartLayer(int layer, const KvSlot& slot, LayerReport* report) {
  ++started_layers_;
  const auto compute = [&] { return ComputeLayer(layer, slot, report); };
  absl::Status status = parts_.device->Mark(MarkOf(kLayerBegins, layer));
  if (status.ok() && layer == 0) status = Begin();
  if (status.ok()) {
    status = IsRecorded(layer) ? parts_.device->Repeat(KeyOf(layer, slot), compute) : compute();
  }
  if (status.ok()) status = parts_.device->Mark(MarkOf(kLayerDone, layer));
  return status;
}

absl::Status PromptSequence::Begin() {
  // One rotation fits all prompts of a batch.
  absl::Status status = parts_.step->Embed(prompts_, prompts_.places().front().count);
  if (!status.ok() || !is_batch()) return status;
  const std::vector<uint32_t> pattern = prompts_.Pattern(parts_.block_tokens);
  return parts_.device->Upload(parts_.batch_pattern.data(), pattern.data(),
                               pattern.size() * sizeof(uint32_t));
}

// What is different from prompt to prompt of one length does not enter a recorded layer: tokens,
// positions and the pattern of a batch lie in device memory, written by Begin.
bool PromptSequence::IsRecorded(int layer) const {
  return policy_ == AttentionPolicy::kDense && !LastQueryAlone(layer) &&
         num_tokens() <= parts_.max_graph_tokens;
}

Device::RecordingKey PromptSequence::KeyOf(int layer, const KvSlot& slot) const {
  return {layer, std::bit_cast<int64_t>(slot.k), is_batch() ? -num_tokens() : num_tokens(),
          std::bit_cast<int32_t>(parts_.step->attention_factor())};
}

absl::Status PromptSequence::ComputeLayer(int layer, const KvSlot& slot, LayerReport* report) {
  LayerStep& step = *parts_.step;
  const KvDestination kv = {
      .k = slot.k, .v = slot.v, .head_stride = kv_head_stride(), .token_stride = config().head_dim};
  const bool alone = LastQueryAlone(layer);
  absl::Status status =
      alone ? step.BeforeLastAttention(layer, kv) : step.BeforeAttention(layer, kv);
  if (status.ok()) status = Attend(layer, slot, report);
  if (!status.ok()) return status;
  return alone ? step.AfterLastAttention(layer) : step.AfterAttention(layer);
}

absl::Status PromptSequence::Attend(int layer, const KvSlot& slot, LayerReport* report) {
  const bool alone = LastQueryAlone(layer);
  kernels::AttentionParams attention = {
      .q = parts_.step->queries(),
      .k = slot.k,
      .v = slot.v,
      .out = parts_.step->queries(),
      .num_queries = alone ? 1 : num_tokens(),
      .num_keys = alone ? prompts_.places().front().count : num_tokens(),
      .kv_head_stride = kv_head_stride(),
      .num_heads = config().num_heads,
      .num_kv_heads = config().num_kv_heads,
      .head_dim = config().head_dim,
      .block_tokens = parts_.block_tokens,
      .scale = 1.0f / std::sqrt(static_cast<float>(config().head_dim)),
  };
  if (!IsDense(layer)) {
    if (!IsBaseline(policy_)) return parts_.sharing->Attend(layer, attention, report);
    // Takes its times by the host's clock.
    absl::Status status = parts_.device->Synchronize();
    return status.ok() ? parts_.baseline->Attend(layer, attention, report) : status;
  }
  const auto& work = is_batch() ? parts_.batch_work : parts_.dense_work;
  attention.work = work.data();
  attention.num_work = static_cast<int>(work.size());
  absl::Status status = parts_.device->Mark(MarkOf(kDenseBegins, layer));
  if (status.ok()) status = parts_.device->ops().Attention(attention);
  if (status.ok()) status = parts_.device->Mark(MarkOf(kDenseDone, layer));
  return status;
}

// Nothing else waits for the device but decisions about patterns.
absl::Status PromptSequence::FinishLayer(LayerReport* report) {
  const int layer = report->layer;
  const absl::StatusOr<double> us =
      parts_.device->ElapsedUs(MarkOf(kLayerBegins, layer), MarkOf(kLayerDone, layer));
  if (!us.ok()) return us.status();
  report->compute_us = static_cast<int64_t>(*us);
  report->num_queries = LastQueryAlone(layer) ? 1 : num_tokens();
  return ReportAttention(report);
}

absl::Status PromptSequence::ReportAttention(LayerReport* report) {
  const int layer = report->layer;
  if (!IsDense(layer)) {
    return IsBaseline(policy_) ? absl::OkStatus() : parts_.sharing->Report(report);
  }
  const absl::StatusOr<double> us =
      parts_.device->ElapsedUs(MarkOf(kDenseBegins, layer), MarkOf(kDenseDone, layer));
  if (!us.ok()) return us.status();
  report->attention_us = static_cast<int64_t>(*us);
  report->dense_heads = LastQueryAlone(layer) ? 0 : config().num_heads;
  report->density = 1.0;
  return absl::OkStatus();
}

absl::Status PromptSequence::PackKv(int layer, const KvSelection& selection, void* dst) {
  absl::StatusOr<KvSlot> slot = parts_.slots->Computed(layer);
  if (!slot.ok()) return slot.status();
  if (absl::Status status = CheckSelection(selection); !status.ok()) return status;
  const PromptPlace& place = prompts_.places()[selection.prompt];
  const int64_t first_byte = place.first * config().head_dim *
                             static_cast<int64_t>(kernels::SizeOf(parts_.info.native_dtype));
  return parts_.device->PackKv({.k = static_cast<const char*>(slot->k) + first_byte,
                                .v = static_cast<const char*>(slot->v) + first_byte,
                                .kv_head_stride = kv_head_stride(),
                                .num_tokens = place.count,
                                .first_block = selection.first_block,
                                .num_blocks = selection.num_blocks,
                                .block_tokens = selection.block_tokens,
                                .first_head = selection.first_head,
                                .num_heads = selection.num_heads,
                                .head_dim = config().head_dim,
                                .order = selection.order,
                                .dst_dtype = selection.dtype,
                                .dst = dst});
}

absl::StatusOr<std::vector<std::vector<float>>> PromptSequence::FinalLogits() {
  if (absl::Status status = CheckFinished(); !status.ok()) return status;
  return parts_.step->Logits();
}

absl::StatusOr<PromptLogprobs> PromptSequence::Logprobs(int prompt,
                                                        absl::FunctionRef<bool()> go_on) {
  if (absl::Status status = CheckFinished(); !status.ok()) return status;
  if (absl::Status status = CheckPrompt(prompt); !status.ok()) return status;
  if (!logprobs_) {
    return absl::FailedPreconditionError("logprobs asked for, but not when the prompt was started");
  }
  return parts_.step->LogprobsOf(prompt, prompts_.tokens_of(prompt), go_on);
}

absl::Status PromptSequence::CheckFinished() const {
  if (next_layer_ == config().num_layers) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("logits asked for after ", next_layer_, " of ", config().num_layers, " layers"));
}

absl::Status PromptSequence::CheckPrompt(int prompt) const {
  if (prompt >= 0 && prompt < prompts_.count()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("prompt ", prompt, " is outside the batch of ", prompts_.count()));
}

absl::Status PromptSequence::CheckSelection(const KvSelection& selection) const {
  if (absl::Status status = CheckPrompt(selection.prompt); !status.ok()) return status;
  const int block_tokens = selection.block_tokens;
  if (block_tokens != 16 && block_tokens != 32 && block_tokens != 64 && block_tokens != 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv.block_tokens ", block_tokens, " unsupported; built for 16, 32, 64, 128"));
  }
  const int64_t blocks = kernels::CeilDiv(prompts_.places()[selection.prompt].count, block_tokens);
  if (selection.first_block < 0 || selection.num_blocks < 1 ||
      selection.num_blocks > blocks - selection.first_block) {
    return absl::InvalidArgumentError(absl::StrCat("kv.first_block ", selection.first_block,
                                                   " and kv.num_blocks ", selection.num_blocks,
                                                   " do not lie within the prompt's ", blocks));
  }
  if (selection.first_head < 0 || selection.num_heads < 1 ||
      selection.num_heads > config().num_kv_heads - selection.first_head) {
    return absl::InvalidArgumentError(absl::StrCat(
        "kv.first_head ", selection.first_head, " and kv.num_heads ", selection.num_heads,
        " do not lie within the model's ", config().num_kv_heads));
  }
  return absl::OkStatus();
}

}  // namespace prefilld::model
