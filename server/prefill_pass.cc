#include "server/prefill_pass.h"

#include <algorithm>
#include <utility>

#include "model/decode/sampling.h"
#include "proto/status_macros.h"
#include "server/metrics.h"

namespace prefilld::server {

int WholeLayers(int num_layers, const PrefillWork& work) {
  return work.prompt_logprobs ? num_layers : std::max(1, num_layers - 1);
}

PrefillPass::PrefillPass(const PassResources& resources,
                         std::vector<std::shared_ptr<PrefillJob>> jobs,
                         std::unique_ptr<model::PrefillSequence> sequence, int num_layers)
    : resources_(resources),
      jobs_(std::move(jobs)),
      num_layers_(num_layers),
      complete_(jobs_.size(), false),
      num_logprobs_(jobs_.size(), 0),
      sequence_(std::move(sequence)),
      source_(resources.packer.Add(jobs_, *sequence_)) {
  for (const auto& job : jobs_) {
    num_tokens_ += static_cast<int64_t>(job->work().tokens.size());
    if (job->wanted()) {
      job->Start(sequence_->policy(), static_cast<int>(jobs_.size()), sequence_->cached_tokens());
    }
  }
  // Frames may leave only now that the jobs have started.
  if (sequence_->cached_tokens() > 0) source_->StartCached();
  resources_.metrics.CountPass(static_cast<int>(jobs_.size()));
}

absl::StatusOr<PrefillPass::StepReport> PrefillPass::Step(absl::FunctionRef<void()> at_point,
                                                          bool may_compute) {
  PREFILLD_ASSIGN_OR_RETURN(const StepReport report, NextStep(at_point, may_compute));
  // A frame of a request that has ended may still be packed, and may be the one that fails.
  if (report.next == Next::kOver) PREFILLD_RETURN_IF_ERROR(source_->Close());
  return report;
}

absl::StatusOr<PrefillPass::StepReport> PrefillPass::NextStep(absl::FunctionRef<void()> at_point,
                                                              bool may_compute) {
  EndStall();
  PREFILLD_ASSIGN_OR_RETURN(const bool has_room, source_->HasRoom());
  StepReport report;
  CheckTimers();
  if (AllEnded()) {
    report.next = Next::kOver;
    return report;
  }
  // All jobs may have ended when the caller asked, and a receiver may have joined since.
  if (!may_compute && HasWork()) {
    report.next = Next::kConsumers;
    return report;
  }
  if (layers_computed_ < num_layers_) {
    if (!has_room) {
      stalled_since_ = resources_.clock.Now();
      report.next = Next::kConsumers;
      return report;
    }
    const auto computed = ComputeLayer(at_point);
    if (absl::IsCancelled(computed.status()) && AllEnded()) {
      report.next = Next::kOver;
      return report;
    }
    PREFILLD_RETURN_IF_ERROR(computed.status());
    report.layer = *computed;
  } else if (!has_first_tokens_) {
    PREFILLD_RETURN_IF_ERROR(ComputeFirstTokens());
    report.first_tokens_after = computing();
    // The next step may be far off, inside a layer of another pass or behind it.
    FinishWhatHasLeft();
  } else if (const std::optional<size_t> job = NextLogprobs()) {
    FinishWhatHasLeft();
    PREFILLD_RETURN_IF_ERROR(ComputeLogprobs(*job));
  } else {
    report.next = FinishWhatHasLeft() ? Next::kOver : Next::kConsumers;
  }
  return report;
}

absl::StatusOr<std::optional<absl::Duration>> PrefillPass::ComputeLayer(
    absl::FunctionRef<void()> at_point) {
  const absl::Duration computing_before = computing();
  const auto go_on = [&] {
    resources_.progress.Record();
    CheckTimers();
    if (!AllEnded()) at_point();
    return !AllEnded();
  };
  PREFILLD_ASSIGN_OR_RETURN(const model::LayerReport report, sequence_->RunLayer(go_on));
  const absl::Duration took = computing() - computing_before;
  if (layers_computed_ > 0) layers_took_ += took;
  resources_.progress.Record();
  resources_.metrics.CountLayer(report, static_cast<int>(jobs_.size()), num_computed_tokens());
  for (const auto& job : jobs_) {
    if (job->wanted()) job->RecordLayer(report);
  }
  source_->LayerDone(layers_computed_++);
  const bool is_whole = report.num_queries > 1 || num_computed_tokens() == 1;
  return is_whole ? std::optional(took) : std::nullopt;
}

absl::Status PrefillPass::ComputeFirstTokens() {
  PREFILLD_ASSIGN_OR_RETURN(const auto logits, sequence_->FinalLogits());
  has_first_tokens_ = true;
  for (size_t i = 0; i < jobs_.size(); ++i) {
    PrefillJob& job = *jobs_[i];
    complete_[i] = !job.work().prompt_logprobs;
    if (!job.wanted()) continue;
    const auto num_tokens = static_cast<int64_t>(job.work().tokens.size());
    auto token = model::Sample(logits[i], job.work().sampling, num_tokens);
    if (token.ok()) {
      job.record().SetFirstToken(resources_.clock.Now(), *std::move(token));
    } else {
      job.Abort(Outcome::kInternal, token.status());
      // The first call may have ended alone before.
      for (const auto& receiver : job.others().jobs) {
        receiver->Abort(Outcome::kInternal, token.status());
      }
    }
    resources_.progress.Record();
  }
  return absl::OkStatus();
}

std::optional<size_t> PrefillPass::NextLogprobs() const {
  for (size_t i = 0; i < jobs_.size(); ++i) {
    if (!complete_[i] && !jobs_[i]->ended()) return i;
  }
  return std::nullopt;
}

absl::Status PrefillPass::ComputeLogprobs(size_t i) {
  PrefillJob& job = *jobs_[i];
  if (LogprobsLeft(i) > 0) {
    const absl::Time started = resources_.clock.Now();
    const absl::Duration computed_before = computing();
    PREFILLD_ASSIGN_OR_RETURN(const model::PromptLogprobs part,
                              sequence_->Logprobs(static_cast<int>(i), num_logprobs_[i]));
    num_logprobs_[i] += static_cast<int64_t>(part.of_token.size());
    logprobs_took_ += computing() - computed_before;
    job.record().AddLogprobs(part, resources_.clock.Now() - started);
  }
  complete_[i] = LogprobsLeft(i) == 0;
  resources_.progress.Record();
  return absl::OkStatus();
}

int64_t PrefillPass::LogprobsLeft(size_t i) const {
  const PrefillJob& job = *jobs_[i];
  if (job.ended() || !job.work().prompt_logprobs) return 0;
  return static_cast<int64_t>(job.work().tokens.size()) - 1 - num_logprobs_[i];
}

absl::Duration PrefillPass::Remaining(absl::Duration predicted_layer) const {
  // A layer that was slow for once must not make a short prompt rank as a long one: it would be
  // overtaken, so no other layer would be computed that shows what is true.
  constexpr int kPredictionCounts = 4;  // layers
  const absl::Duration layer = (kPredictionCounts * predicted_layer + layers_took_) /
                               (kPredictionCounts + std::max(0, layers_computed_ - 1));
  int64_t computed = 0, left = 0;  // log-probabilities
  for (size_t i = 0; i < jobs_.size(); ++i) {
    computed += num_logprobs_[i];
    left += LogprobsLeft(i);
  }
  const absl::Duration logprob = computed > 0 ? logprobs_took_ / computed : layer / num_tokens_;
  const int whole_layers =
      jobs_.size() == 1 ? WholeLayers(num_layers_, jobs_.front()->work()) : num_layers_;
  return std::max(0, whole_layers - layers_computed_) * layer + left * logprob;
}

// Ends the time of a layer that waited for a slot, whether or not there is one now.
void PrefillPass::EndStall() {
  if (!stalled_since_.has_value()) return;
  const absl::Duration stalled = resources_.clock.Now() - *stalled_since_;
  stalled_since_.reset();
  for (const auto& job : jobs_) job->record().AddStall(stalled);
  resources_.metrics.CountStall(stalled);
}

// A deadline ends a job between two layers.
void PrefillPass::CheckTimers() {
  auto going_on =
      std::count_if(jobs_.begin(), jobs_.end(), [](const auto& job) { return job->wanted(); });
  for (const auto& job : jobs_) {
    if (job->ended()) continue;
    job->CheckTimers(resources_.timeouts, /*queue_position=*/0, /*others_wait=*/going_on > 1);
    if (!job->wanted()) --going_on;
  }
}

bool PrefillPass::AllEnded() const {
  return std::none_of(jobs_.begin(), jobs_.end(), [](const auto& job) { return job->wanted(); });
}

// Sends the results that are due. Returns whether every receiver has its result or has ended.
bool PrefillPass::FinishWhatHasLeft() {
  bool all = true;
  for (size_t i = 0; i < jobs_.size(); ++i) {
    const OtherReceivers::Present others = jobs_[i]->others();
    if (others.awaited) {
      all = false;
      continue;
    }
    for (const auto& receiver : others.jobs) all = FinishIfLeft(i, *receiver) && all;
    // A call that has its KV pushed to others is told how all of that ended.
    const bool pushes_are_over =
        std::all_of(others.jobs.begin(), others.jobs.end(),
                    [](const auto& receiver) { return receiver->ended(); });
    if (jobs_[i]->work().takes_kv || pushes_are_over) {
      all = FinishIfLeft(i, *jobs_[i]) && all;
    } else {
      all = all && jobs_[i]->ended();
    }
  }
  return all;
}

bool PrefillPass::FinishIfLeft(size_t i, PrefillJob& receiver) {
  if (receiver.finished() || receiver.ended()) return true;
  // Log-probabilities are those of the first call alone, and are not computed once it has ended.
  if (!complete_[i] && !jobs_[i]->ended()) return false;
  if (!source_->HasLeft(receiver)) return false;
  jobs_[i]->Finish(receiver);
  return true;
}

}  // namespace prefilld::server
