#include "model/prefill/prompt_sequence.h"

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numeric>

#include "absl/strings/str_cat.h"
#include "kernels/dtype.h"
#include "proto/status_macros.h"

namespace prefilld::model {

PromptSequence::PromptSequence(EngineParts* parts, PromptState* state)
    : parts_(*parts),
      state_(*state),
      step_(parts->MayInterject(state->num_tokens(), state->options.policy) ? *parts->short_step
                                                                            : *parts->step),
      all_of_last_layer_(state->logprobs || state->is_batch() || state->num_computed() == 1),
      num_cached_(state->num_cached()),
      saves_(!state->prefix.added().empty()) {
  // A prompt that had the state before may have been given up within a layer.
  for (InterruptedTimes& times : state_.interrupted) parts_.points->Reset(&times);
}

// A layer may still be computed. The state's next user writes to its memory only by work that is
// queued behind that layer.
// Copies to and from the prefix cache are on other streams, so they are waited for. A failure of
// the device is reported by whoever uses it next.
PromptSequence::~PromptSequence() {
  HostCopies& copies = parts_.device->host_copies();
  if (num_cached_ > 0) copies.FinishLoads().IgnoreError();
  if (saves_) copies.FinishSaves().IgnoreError();
  state_.prefix.Reset();
  parts_.states.GiveBack(&state_);
}

absl::StatusOr<LayerReport> PromptSequence::RunLayer(absl::FunctionRef<bool()> at_point) {
  if (may_interject()) return RunNextLayer();
  parts_.points->Begin(at_point);
  auto report = RunNextLayer();
  parts_.points->End();
  return report;
}

absl::StatusOr<LayerReport> PromptSequence::RunNextLayer() {
  PREFILLD_RETURN_IF_ERROR(state_.failure);
  const int layer = state_.next_layer;
  if (layer == config().num_layers) {
    return absl::FailedPreconditionError(absl::StrCat("all ", layer, " layers are computed"));
  }
  LayerReport report;
  report.layer = layer;
  if (state_.started_layers == layer) {
    PREFILLD_ASSIGN_OR_RETURN(const KvSlot slot, TakeSlot(layer));
    state_.failure = StartLayer(layer, slot, &report);
  }
  if (state_.failure.ok()) state_.failure = StartNextAhead();
  if (state_.failure.ok()) state_.failure = FinishLayer(&report);
  PREFILLD_RETURN_IF_ERROR(state_.failure);
  state_.slots->MarkComputed(state_.next_layer++);
  state_.failure = SaveComputed(layer);
  PREFILLD_RETURN_IF_ERROR(state_.failure);
  return report;
}

absl::StatusOr<KvSlot> PromptSequence::TakeSlot(int layer) {
  if (!state_.loading.has_value() || state_.loading->first != layer) {
    return state_.slots->Acquire(layer);
  }
  return state_.loading->second;
}

absl::Status PromptSequence::LoadCached(int layer, const KvSlot& slot) {
  if (num_cached_ == 0) return absl::OkStatus();
  const auto start = [&](int of_layer, const KvSlot& into) {
    return parts_.prefixes->StartLoad(state_.prefix, of_layer, into, kv_head_stride());
  };
  const bool on_its_way = state_.loading.has_value() && state_.loading->first == layer;
  if (!on_its_way) PREFILLD_RETURN_IF_ERROR(start(layer, slot));
  state_.loading.reset();
  PREFILLD_RETURN_IF_ERROR(parts_.device->host_copies().OrderOpsBehindLoads());
  const int next = layer + 1;
  if (next == config().num_layers || !state_.slots->HasFree()) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(const KvSlot next_slot, state_.slots->Acquire(next));
  state_.loading = {next, next_slot};
  return start(next, next_slot);
}

absl::Status PromptSequence::SaveComputed(int layer) {
  if (!saves_) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(const KvSlot slot, state_.slots->Computed(layer));
  return parts_.prefixes->StartSave(state_.prefix, layer, slot, kv_head_stride());
}

// Without its saves the slot would be written anew while it is read. They began when the layer was
// done, so by the time that its last frame is packed they rarely have to be waited for.
void PromptSequence::ReleaseKv(int layer) {
  if (saves_) parts_.device->host_copies().FinishSaves().IgnoreError();
  state_.slots->Release(layer);
}

// Another sequence may queue its layers before this one is waited for, and that is right:
// - The device computes in the order of the calls, so a layer is done with the scratch of LayerStep
//   and the workspaces before a layer queued later writes to it.
// - Everything that the layer leaves behind is in this state, which no other sequence touches:
//   hidden states, a KV slot of its own, marks of its own. FinishLayer waits for those marks.
// - The host keeps nothing of it: its attention only queues, and reports from its marks.
absl::Status PromptSequence::StartNextAhead() {
  const int layer = state_.started_layers;
  const bool may = state_.strategy().only_queues() &&
                   state_.num_tokens() <= parts_.run_ahead_tokens && layer < config().num_layers &&
                   (state_.loading.has_value() || state_.slots->HasFree());
  if (!may) return absl::OkStatus();
  PREFILLD_ASSIGN_OR_RETURN(const KvSlot slot, TakeSlot(layer));
  LayerReport nothing_to_report;  // a strategy that only queues finds nothing on the way
  return StartLayer(layer, slot, &nothing_to_report);
}

absl::Status PromptSequence::StartLayer(int layer, const KvSlot& slot, LayerReport* report) {
  ++state_.started_layers;
  Device& device = *parts_.device;
  const auto compute = [&] { return ComputeLayer(layer, slot, report); };
  const int begins = state_.MarkOf(PromptState::kLayerBegins, layer);
  PREFILLD_RETURN_IF_ERROR(device.Mark(begins));
  if (!may_interject()) parts_.points->StartLayer(&state_.interrupted[layer % 2], begins);
  if (layer == 0) PREFILLD_RETURN_IF_ERROR(Begin());
  PREFILLD_RETURN_IF_ERROR(LoadCached(layer, slot));
  PREFILLD_RETURN_IF_ERROR(IsRecorded(layer) ? device.Repeat(KeyOf(layer, slot), compute)
                                             : compute());
  return device.Mark(state_.MarkOf(PromptState::kLayerDone, layer));
}

absl::Status PromptSequence::Begin() {
  // All prompts of a batch have the same rotation.
  const int64_t rope_tokens = state_.prompts.places().front().count;
  if (num_cached_ > 0) {
    const auto computed = state_.prompts.tokens().subspan(static_cast<size_t>(num_cached_));
    return step_.Embed(state_.hidden, computed, num_cached_, rope_tokens);
  }
  PREFILLD_RETURN_IF_ERROR(step_.Embed(state_.hidden, state_.prompts, rope_tokens));
  if (!state_.is_batch()) return absl::OkStatus();
  const std::vector<uint32_t> pattern = state_.prompts.Pattern(parts_.block_tokens);
  return parts_.device->Upload(state_.batch_pattern.data(), pattern.data(),
                               pattern.size() * sizeof(uint32_t));
}

// Nothing that differs between prompts of one length enters a recorded layer: tokens, positions and
// the pattern of a batch lie in the state's device memory, written by Begin.
bool PromptSequence::IsRecorded(int layer) const {
  // A layer with turn points is not recorded, or else a listener's work would enter the recording.
  return may_interject() && state_.strategy().only_queues() && !LastQueryAlone(layer) &&
         num_cached_ == 0 && state_.num_tokens() <= parts_.max_graph_tokens;
}

// The addresses of a state's memory, and its marks, are part of a recording. Its slot tells them
// from those of other states, because no two states have a slot in common.
Device::RecordingKey PromptSequence::KeyOf(int layer, const KvSlot& slot) const {
  const int64_t num_tokens = state_.num_tokens();
  return {layer, std::bit_cast<int64_t>(slot.k), state_.is_batch() ? -num_tokens : num_tokens,
          std::bit_cast<int32_t>(state_.hidden.rotation.attention_factor)};
}

absl::Status PromptSequence::ComputeLayer(int layer, const KvSlot& slot, LayerReport* report) {
  const int64_t first_byte = num_cached_ * token_bytes();
  const KvDestination kv = {.k = static_cast<char*>(slot.k) + first_byte,
                            .v = static_cast<char*>(slot.v) + first_byte,
                            .head_stride = kv_head_stride(),
                            .token_stride = config().head_dim};
  const bool alone = LastQueryAlone(layer);
  PREFILLD_RETURN_IF_ERROR(alone ? step_.BeforeLastAttention(state_.hidden, layer, kv)
                                 : step_.BeforeAttention(state_.hidden, layer, kv));
  PREFILLD_RETURN_IF_ERROR(StrategyOf(layer).Attend(layer, AttentionOf(layer, slot), report));
  return alone ? step_.AfterLastAttention(state_.hidden, layer)
               : step_.AfterAttention(state_.hidden, layer);
}

kernels::AttentionParams PromptSequence::AttentionOf(int layer, const KvSlot& slot) const {
  const bool alone = LastQueryAlone(layer);
  return {.q = step_.queries(),
          .k = slot.k,
          .v = slot.v,
          .out = step_.queries(),
          .num_queries = alone ? 1 : state_.num_tokens() - num_cached_,
          .num_keys = alone ? state_.prompts.places().front().count : state_.num_tokens(),
          .kv_head_stride = kv_head_stride(),
          .num_heads = config().num_heads,
          .num_kv_heads = config().num_kv_heads,
          .head_dim = config().head_dim,
          .block_tokens = parts_.block_tokens,
          .scale = 1.0f / std::sqrt(static_cast<float>(config().head_dim))};
}

// Only decisions about patterns also wait for the device.
absl::Status PromptSequence::FinishLayer(LayerReport* report) {
  const int layer = report->layer;
  PREFILLD_ASSIGN_OR_RETURN(
      const double us, parts_.device->ElapsedUs(state_.MarkOf(PromptState::kLayerBegins, layer),
                                                state_.MarkOf(PromptState::kLayerDone, layer)));
  report->num_queries = LastQueryAlone(layer) ? 1 : state_.num_tokens() - num_cached_;
  PREFILLD_RETURN_IF_ERROR(StrategyOf(layer).Report(report));
  InterruptedTimes& times = state_.interrupted[layer % 2];
  PREFILLD_RETURN_IF_ERROR(parts_.points->Settle(times));
  const auto others = [&times](LayerStage stage) {
    return static_cast<int64_t>(times.others_us[static_cast<size_t>(stage)]);
  };
  report->pattern_us -= others(LayerStage::kPatterns);
  report->attention_us -= others(LayerStage::kAttention);
  const double own_us = us - std::accumulate(times.others_us.begin(), times.others_us.end(), 0.0);
  report->compute_us = static_cast<int64_t>(own_us);
  device_us_ += own_us;
  times = {};
  return absl::OkStatus();
}

double PromptSequence::device_us() const {
  return device_us_ + state_.interrupted[0].own_us + state_.interrupted[1].own_us;
}

absl::Status PromptSequence::PackKv(int layer, const KvSelection& selection, void* dst) {
  PREFILLD_ASSIGN_OR_RETURN(const KvSlot slot, state_.slots->Computed(layer));
  PREFILLD_RETURN_IF_ERROR(CheckSelection(selection));
  const PromptPlace& place = state_.prompts.places()[selection.prompt];
  const int64_t first_byte = place.first * token_bytes();
  kernels::PackKvParams params = ParamsOf(selection, dst);
  params.k = static_cast<const char*>(slot.k) + first_byte;
  params.v = static_cast<const char*>(slot.v) + first_byte;
  params.kv_head_stride = kv_head_stride();
  return parts_.device->PackKv(params);
}

// The lease holds the blocks, so nobody evicts them or writes to them.
absl::Status PromptSequence::PackCachedKv(int layer, const KvSelection& selection, void* dst) {
  if (layer < 0 || layer >= config().num_layers) {
    return absl::InvalidArgumentError(
        absl::StrCat("layer ", layer, " is outside the model's ", config().num_layers));
  }
  PREFILLD_RETURN_IF_ERROR(CheckSelection(selection));
  const int64_t end = selection.first_block + selection.num_blocks;
  if (end * selection.block_tokens > num_cached_) {
    return absl::FailedPreconditionError(
        absl::StrCat("kv block ", end - 1, " of ", selection.block_tokens, " tokens ends behind ",
                     num_cached_, " cached tokens"));
  }
  parts_.prefixes->PackFound(state_.prefix, layer, ParamsOf(selection, dst));
  return absl::OkStatus();
}

kernels::PackKvParams PromptSequence::ParamsOf(const KvSelection& selection, void* dst) const {
  return {.num_tokens = state_.prompts.places()[selection.prompt].count,
          .first_block = selection.first_block,
          .num_blocks = selection.num_blocks,
          .block_tokens = selection.block_tokens,
          .first_head = selection.first_head,
          .num_heads = selection.num_heads,
          .head_dim = config().head_dim,
          .order = selection.order,
          .dst_dtype = selection.dtype,
          .scales = selection.scales,
          .src_dtype = parts_.info.native_dtype,
          .dst = dst};
}

absl::StatusOr<std::vector<std::vector<float>>> PromptSequence::FinalLogits() {
  PREFILLD_RETURN_IF_ERROR(CheckFinished());
  std::vector<std::vector<float>> logits;
  PREFILLD_RETURN_IF_ERROR(Timed([&]() -> absl::Status {
    PREFILLD_ASSIGN_OR_RETURN(logits, step_.Logits(state_.hidden));
    return absl::OkStatus();
  }));
  PREFILLD_RETURN_IF_ERROR(PublishSaved());
  return logits;
}

// No layer is under way any more, so the marks of one are free.
absl::Status PromptSequence::Timed(absl::FunctionRef<absl::Status()> ops) {
  const int begins = state_.MarkOf(PromptState::kLayerBegins, config().num_layers);
  const int done = state_.MarkOf(PromptState::kLayerDone, config().num_layers);
  PREFILLD_RETURN_IF_ERROR(parts_.device->Mark(begins));
  const absl::Status status = ops();
  PREFILLD_RETURN_IF_ERROR(parts_.device->Mark(done));
  PREFILLD_ASSIGN_OR_RETURN(const double us, parts_.device->ElapsedUs(begins, done));
  device_us_ += us;
  return status;
}

// The last layer was saved beside the logits.
absl::Status PromptSequence::PublishSaved() {
  if (!saves_) return absl::OkStatus();
  PREFILLD_RETURN_IF_ERROR(parts_.device->host_copies().FinishSaves());
  state_.prefix.Publish();
  return absl::OkStatus();
}

absl::StatusOr<PromptLogprobs> PromptSequence::Logprobs(int prompt, int64_t first) {
  PREFILLD_RETURN_IF_ERROR(CheckFinished());
  PREFILLD_RETURN_IF_ERROR(CheckPrompt(prompt));
  if (!state_.logprobs) {
    return absl::FailedPreconditionError("logprobs asked for, but not when the prompt was started");
  }
  PromptLogprobs logprobs;
  PREFILLD_RETURN_IF_ERROR(Timed([&]() -> absl::Status {
    PREFILLD_ASSIGN_OR_RETURN(
        logprobs, step_.LogprobsOf(state_.hidden, prompt, state_.prompts.tokens_of(prompt), first));
    return absl::OkStatus();
  }));
  return logprobs;
}

absl::Status PromptSequence::CheckFinished() const {
  if (state_.next_layer == config().num_layers) return absl::OkStatus();
  return absl::FailedPreconditionError(absl::StrCat("logits asked for after ", state_.next_layer,
                                                    " of ", config().num_layers, " layers"));
}

absl::Status PromptSequence::CheckPrompt(int prompt) const {
  if (prompt >= 0 && prompt < state_.prompts.count()) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("prompt ", prompt, " is outside the batch of ", state_.prompts.count()));
}

absl::Status PromptSequence::CheckSelection(const KvSelection& selection) const {
  PREFILLD_RETURN_IF_ERROR(CheckPrompt(selection.prompt));
  const int block_tokens = selection.block_tokens;
  if (block_tokens != 16 && block_tokens != 32 && block_tokens != 64 && block_tokens != 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("kv.block_tokens ", block_tokens, " unsupported; built for 16, 32, 64, 128"));
  }
  const int64_t blocks =
      kernels::CeilDiv(state_.prompts.places()[selection.prompt].count, block_tokens);
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
