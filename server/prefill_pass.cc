#include "server/prefill_pass.h"

#include <algorithm>
#include <utility>

#include "model/decode/sampling.h"
#include "server/kv_stream.h"
#include "server/metrics.h"

namespace prefilld::server {

PrefillPass::PrefillPass(const PassResources& resources,
                         std::vector<std::shared_ptr<PrefillJob>> jobs,
                         model::PrefillSequence& sequence)
    : resources_(resources),
      jobs_(std::move(jobs)),
      sequence_(sequence),
      complete_(jobs_.size(), false),
      finished_(jobs_.size(), false) {
  for (const auto& job : jobs_) num_tokens_ += static_cast<int64_t>(job->work().tokens.size());
}

absl::Status PrefillPass::Run() {
  for (const auto& job : jobs_) {
    if (!job->ended()) job->Start(sequence_.policy(), static_cast<int>(jobs_.size()));
  }
  resources_.metrics.CountPass(static_cast<int>(jobs_.size()));
  resources_.stream.Begin(jobs_, sequence_);
  absl::Status status = Compute();
  // The packing threads borrow the sequence until here.
  status.Update(resources_.stream.End([this](size_t job) { Finish(job); }));
  return status;
}

// OK also when all jobs ended on the way.
absl::Status PrefillPass::Compute() {
  const absl::Time started = resources_.clock.Now();
  absl::Status status = ComputeLayers();
  if (!status.ok() || AllEnded()) return status;
  status = ComputeFirstTokens();
  if (!status.ok()) return status;
  resources_.on_first_tokens(*this, resources_.clock.Now() - started - stalled_);
  for (size_t i = 0; i < jobs_.size(); ++i) complete_[i] = !jobs_[i]->work().prompt_logprobs;
  for (size_t i = 0; i < jobs_.size() && status.ok(); ++i) {
    if (!complete_[i] && !jobs_[i]->ended()) status = ComputeLogprobs(i);
  }
  return status;
}

absl::Status PrefillPass::ComputeLayers() {
  for (int layer = 0; layer < resources_.num_layers; ++layer) {
    if (absl::Status slot = WaitForSlot(); !slot.ok()) return slot;
    if (AllEnded()) return absl::OkStatus();
    const auto report = sequence_.RunLayer();
    if (!report.ok()) return report.status();
    resources_.on_progress();
    resources_.metrics.CountLayer(*report, static_cast<int>(jobs_.size()), num_tokens_);
    for (const auto& job : jobs_) {
      if (!job->ended()) job->RecordLayer(*report);
    }
    resources_.stream.LayerDone(layer);
  }
  return absl::OkStatus();
}

absl::Status PrefillPass::WaitForSlot() {
  const absl::Time ready = resources_.clock.Now();
  absl::Status slot = resources_.stream.WaitForSlot();
  const absl::Duration stalled = resources_.clock.Now() - ready;
  for (const auto& job : jobs_) job->RecordStall(stalled);
  resources_.metrics.CountStall(stalled);
  stalled_ += stalled;
  return slot;
}

absl::Status PrefillPass::ComputeFirstTokens() {
  const auto logits = sequence_.FinalLogits();
  if (!logits.ok()) return logits.status();
  for (size_t i = 0; i < jobs_.size(); ++i) {
    PrefillJob& job = *jobs_[i];
    if (job.ended()) continue;
    const auto num_tokens = static_cast<int64_t>(job.work().tokens.size());
    auto token = model::Sample((*logits)[i], job.work().sampling, num_tokens);
    if (token.ok()) {
      job.RecordFirstToken(*std::move(token));
    } else {
      job.Abort(Outcome::kInternal, token.status());
    }
    resources_.on_progress();
  }
  return absl::OkStatus();
}

// In small steps, between which other jobs get their results. OK also when the job ended on the
// way.
absl::Status PrefillPass::ComputeLogprobs(size_t i) {
  PrefillJob& job = *jobs_[i];
  const auto go_on = [&] {
    resources_.on_progress();
    FinishWhatHasLeft();
    return !AllEnded() && !job.ended();
  };
  const absl::Time started = resources_.clock.Now();
  auto logprobs = sequence_.Logprobs(static_cast<int>(i), go_on);
  if (absl::IsCancelled(logprobs.status())) return absl::OkStatus();
  if (!logprobs.ok()) return logprobs.status();
  job.RecordLogprobs(*std::move(logprobs), resources_.clock.Now() - started);
  complete_[i] = true;
  resources_.on_progress();
  return absl::OkStatus();
}

bool PrefillPass::AllEnded() {
  const auto ended = [](const auto& job) { return job->ended(); };
  auto going_on = jobs_.size() - std::count_if(jobs_.begin(), jobs_.end(), ended);
  for (const auto& job : jobs_) {
    if (job->ended()) continue;
    job->CheckTimers(resources_.timeouts, /*queue_position=*/0, /*others_wait=*/going_on > 1);
    if (job->ended()) --going_on;
  }
  return std::all_of(jobs_.begin(), jobs_.end(), ended);
}

void PrefillPass::FinishWhatHasLeft() {
  for (size_t i = 0; i < jobs_.size(); ++i) {
    if (resources_.stream.HasLeft(i)) Finish(i);
  }
}

// Once the job's frames have left.
void PrefillPass::Finish(size_t i) {
  if (!complete_[i] || finished_[i]) return;
  finished_[i] = true;
  if (!jobs_[i]->ended()) jobs_[i]->Finish();
}

}  // namespace prefilld::server
