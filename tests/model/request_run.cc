#include "tests/model/request_run.h"

#include <utility>

#include "gtest/gtest.h"
#include "tests/model/prompt_run.h"

namespace prefilld::model {

std::vector<PromptInput> Request::inputs() const {
  std::vector<PromptInput> inputs;
  for (const auto& prompt : prompts) inputs.push_back({prompt, attention, logprobs});
  return inputs;
}

Request RequestMaker::One(int64_t length, const AttentionOptions& attention, bool logprobs) {
  return {{RandomTokens(length, vocab_size_, ++prompts_)}, attention, logprobs};
}

Request RequestMaker::Batch(const std::vector<int64_t>& lengths, bool logprobs) {
  Request request = {{}, DenseAttention(), logprobs};
  for (const int64_t length : lengths) {
    request.prompts.push_back(RandomTokens(length, vocab_size_, ++prompts_));
  }
  return request;
}

AttentionOptions Share() {
  AttentionOptions options;
  options.policy = AttentionPolicy::kShare;
  options.tau = 1.0f;
  options.coverage = 1.0f;
  options.gamma = 0.5f;
  options.min_budget_tokens = 0;
  return options;
}

Runner::Runner(PrefillEngine& engine, const Request& request) : engine_(engine), request_(request) {
  auto sequence = engine.Start(request.inputs());
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  if (sequence.ok()) sequence_ = *std::move(sequence);
}

void Runner::Step(absl::FunctionRef<bool()> at_point) {
  if (num_layers_ < engine_.info().config.num_layers) {
    if (unreleased() == engine_.kv_slots()) PackOldest();
    RunLayer(at_point);
  } else if (outcome.logits.empty()) {
    const auto logits = sequence_->FinalLogits();
    ASSERT_TRUE(logits.ok()) << logits.status();
    outcome.logits = *logits;
  } else if (request_.logprobs && prompt_ < request_.prompts.size()) {
    outcome.logprobs.resize(2 * request_.prompts.size());
    std::vector<float>& of_token = outcome.logprobs[2 * prompt_];
    std::vector<float>& of_best = outcome.logprobs[2 * prompt_ + 1];
    const auto part =
        sequence_->Logprobs(static_cast<int>(prompt_), static_cast<int64_t>(of_token.size()));
    ASSERT_TRUE(part.ok()) << part.status();
    of_token.insert(of_token.end(), part->of_token.begin(), part->of_token.end());
    of_best.insert(of_best.end(), part->of_best.begin(), part->of_best.end());
    if (part->of_token.empty()) ++prompt_;
  } else {
    while (unreleased() > 0) PackOldest();
    sequence_.reset();
  }
}

void Runner::RunLayer(absl::FunctionRef<bool()> at_point) {
  const auto report = sequence_->RunLayer(at_point);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_EQ(report->layer, num_layers_);
  ++num_layers_;
  reports.push_back(*report);
  outcome.heads.push_back({report->dense_heads, report->pivot_heads, report->shared_heads,
                           report->scored_heads, report->score_sharing_heads,
                           report->vertical_slash_heads, report->baseline_heads});
  outcome.density.push_back(report->density);
}

void Runner::PackOldest() {
  for (size_t i = 0; i < request_.prompts.size(); ++i) {
    KvSelection selection =
        WholeLayer(engine_.info().config, static_cast<int64_t>(request_.prompts[i].size()), 16,
                   kernels::KvOrder::kNhd, engine_.info().native_dtype);
    selection.prompt = static_cast<int>(i);
    outcome.kv.push_back(PackLayer(engine_, *sequence_, num_packed_, selection));
  }
  sequence_->ReleaseKv(num_packed_++);
}

Outcome Alone(PrefillEngine& engine, const Request& request) {
  Runner run(engine, request);
  while (!run.done() && !::testing::Test::HasFatalFailure()) run.Step();
  return run.outcome;
}

void ExpectSame(const Outcome& actual, const Outcome& expected) {
  EXPECT_EQ(actual.heads, expected.heads);
  EXPECT_EQ(actual.density, expected.density);
  ASSERT_EQ(actual.kv.size(), expected.kv.size());
  // The bytes are compared one by one, because a failed comparison of all would print too much.
  for (size_t i = 0; i < actual.kv.size(); ++i) EXPECT_TRUE(actual.kv[i] == expected.kv[i]) << i;
  EXPECT_TRUE(actual.logits == expected.logits);
  EXPECT_TRUE(actual.logprobs == expected.logprobs);
}

}  // namespace prefilld::model
