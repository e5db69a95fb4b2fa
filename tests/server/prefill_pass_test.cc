#include "server/prefill_pass.h"

#include <gmock/gmock.h>

#include "tests/server/job_harness.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using Next = PrefillPass::Next;
constexpr int kBlockTokens = 16;

Next Step(PrefillPass& pass) {
  const auto report = pass.Step();
  EXPECT_TRUE(report.ok()) << report.status();
  return report.ok() ? report->next : Next::kOver;
}

// Steps and packs until the pass is over.
void Finish(Bench& bench, PrefillPass& pass) {
  for (int i = 0; i < 1000; ++i) {
    if (Step(pass) == Next::kOver) return;
    bench.PackAll();
  }
  ADD_FAILURE() << "the pass does not come to an end";
}

std::shared_ptr<PrefillJob> NewGradedJob(Bench& bench, int num_tokens) {
  PrefillWork work = WorkOf(bench.engine, num_tokens);
  work.prompt_logprobs = true;
  return std::make_shared<PrefillJob>(std::move(work), bench.clock);
}

// Steps until the first tokens are there.
void StepToFirstTokens(Bench& bench, PrefillPass& pass) {
  while (!pass.jobs().front()->record().stats().first_token_at.has_value()) {
    ASSERT_EQ(Step(pass), Next::kAnotherStep);
    bench.PackAll();
  }
}

TEST(PrefillPass, AStepIsOneLayer) {
  Bench bench({.num_layers = 3});
  const auto job = bench.NewJob(100);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  EXPECT_EQ(job->record().stats().policy, model::AttentionPolicy::kDense);
  for (int layer = 1; layer <= 3; ++layer) {
    EXPECT_EQ(Step(*pass), Next::kAnotherStep);
    EXPECT_EQ(bench.engine.layers_run(), layer);
    EXPECT_EQ(job->record().stats().layers_computed, layer);
    bench.PackAll();
  }
  EXPECT_FALSE(job->record().stats().first_token_at.has_value());
  EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  EXPECT_TRUE(job->record().stats().first_token_at.has_value());
  EXPECT_EQ(Step(*pass), Next::kOver);
  ASSERT_NE(consumer.result(), nullptr);
  EXPECT_EQ(consumer.result()->first_token().token_id(), 100u);
  ExpectWholeCache(consumer.frames(), job->work().layout);
}

TEST(PrefillPass, WaitsForConsumersWithoutBlocking) {
  Bench bench({.kv_slots = 2});
  const auto job = bench.NewJob(100);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Step(*pass), Next::kConsumers);
  EXPECT_EQ(bench.engine.layers_run(), 2);
  bench.PackAll();
  EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  EXPECT_EQ(bench.engine.layers_run(), 3);
}

TEST(PrefillPass, TheTimeThatALayerWaitsForASlotIsAStallAndNoneOfItsSpeed) {
  Bench bench({.num_layers = 3, .kv_slots = 2});
  bench.engine.set_on_layer([&](int64_t) { bench.clock.Advance(absl::Milliseconds(100)); });
  const auto job = bench.NewJob(100);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  for (int i = 0; i < 2; ++i) Step(*pass);
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(Step(*pass), Next::kConsumers);
    bench.clock.Advance(absl::Seconds(2));
  }
  bench.PackAll();
  Step(*pass);
  EXPECT_EQ(job->record().stats().stalled, absl::Seconds(6));
  const auto report = pass->Step();
  ASSERT_TRUE(report.ok());
  EXPECT_EQ(report->first_tokens_after, absl::Milliseconds(300));
  // The time to take what is left after the last layer is no stall.
  EXPECT_EQ(Step(*pass), Next::kConsumers);
  bench.clock.Advance(absl::Seconds(2));
  bench.PackAll();
  EXPECT_EQ(Step(*pass), Next::kOver);
  EXPECT_EQ(consumer.result()->stall_us(), 6'000'000u);
}

TEST(PrefillPass, TwoPassesTakeTurns) {
  Bench bench;
  const auto first = bench.NewJob(100), second = bench.NewJob(50);
  Consumer to_first(first), to_second(second);
  const auto pass = bench.NewPass({first}), other = bench.NewPass({second});
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(Step(*pass), Next::kAnotherStep);
    EXPECT_EQ(Step(*other), Next::kAnotherStep);
    bench.PackAll();
  }
  Finish(bench, *other);
  Finish(bench, *pass);
  ExpectWholeCache(to_first.frames(), first->work().layout);
  ExpectWholeCache(to_second.frames(), second->work().layout);
  EXPECT_EQ(to_first.result()->first_token().token_id(), 100u);
  EXPECT_EQ(to_second.result()->first_token().token_id(), 50u);
}

TEST(PrefillPass, AnotherPassComputesWhileOneWaitsForItsConsumer) {
  Bench bench({.kv_slots = 2}, /*num_buffers=*/4);
  const auto slow = bench.NewJob(10 * kBlockTokens), fast = bench.NewJob(kBlockTokens);
  Consumer to_slow(slow), to_fast(fast);
  to_slow.HoldStill();
  const auto waits = bench.NewPass({slow}), computes = bench.NewPass({fast});
  while (Step(*waits) == Next::kAnotherStep) bench.PackAll();
  Finish(bench, *computes);
  EXPECT_NE(to_fast.result(), nullptr);
  EXPECT_EQ(Step(*waits), Next::kConsumers);
  to_slow.GoOn();
  Finish(bench, *waits);
  ExpectWholeCache(to_slow.frames(), slow->work().layout);
}

TEST(PrefillPass, AResultWaitsForTheLastFrame) {
  Bench bench({.num_layers = 2});
  const auto job = bench.NewJob(2 * kBlockTokens);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  for (int frame = 0; frame < 4; ++frame) {
    EXPECT_EQ(Step(*pass), Next::kConsumers);
    EXPECT_EQ(consumer.result(), nullptr);
    EXPECT_TRUE(bench.packer.PackOne());
  }
  EXPECT_EQ(Step(*pass), Next::kOver);
  EXPECT_NE(consumer.result(), nullptr);
}

TEST(PrefillPass, AnEndedRequestIsComputedOnOnlyForTheOthers) {
  Bench bench({.max_batch_tokens = 1000});
  const auto ended = bench.NewJob(20), other = bench.NewJob(30);
  Consumer to_ended(ended), to_other(other);
  const auto pass = bench.NewPass({ended, other});
  Step(*pass);
  bench.PackAll();
  ended->OnCallCancelled();
  Finish(bench, *pass);
  EXPECT_EQ(to_ended.frames().size(), 2u);  // those of the first layer
  EXPECT_EQ(to_ended.result(), nullptr);
  EXPECT_EQ(ended->record().stats().layers_computed, 1);
  ASSERT_NE(to_other.result(), nullptr);
  EXPECT_EQ(to_other.result()->batch_prompts(), 2u);
  EXPECT_EQ(bench.engine.layers_run(), 4);
}

TEST(PrefillPass, IsOverWhenAllItsRequestsHaveEnded) {
  Bench bench({.max_batch_tokens = 1000});
  const auto first = bench.NewJob(20), second = bench.NewJob(30);
  const auto pass = bench.NewPass({first, second});
  Step(*pass);
  first->OnCallCancelled();
  EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  second->OnCallCancelled();
  EXPECT_EQ(Step(*pass), Next::kOver);
  EXPECT_EQ(bench.engine.layers_run(), 2);
}

TEST(PrefillPass, AResultDoesNotWaitForAnotherPromptsConsumer) {
  Bench bench({.num_layers = 2, .max_batch_tokens = 1000}, /*num_buffers=*/4);
  const auto slow = bench.NewJob(10 * kBlockTokens), fast = bench.NewJob(kBlockTokens);
  Consumer to_slow(slow), to_fast(fast);
  to_slow.HoldStill();
  const auto pass = bench.NewPass({slow, fast});
  for (int i = 0; i < 3; ++i) EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  bench.PackAll();
  EXPECT_EQ(Step(*pass), Next::kConsumers);
  EXPECT_NE(to_fast.result(), nullptr);
  EXPECT_EQ(to_slow.result(), nullptr);
  to_slow.GoOn();
  Finish(bench, *pass);
  EXPECT_NE(to_slow.result(), nullptr);
}

TEST(PrefillPass, AStepIsOnePartOfThePromptsLogprobs) {
  Bench bench;
  const auto job = NewGradedJob(bench, 42);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  StepToFirstTokens(bench, *pass);
  for (int part = 1; part <= FakeEngine::kLogprobsParts; ++part) {
    EXPECT_EQ(Step(*pass), Next::kAnotherStep);
    EXPECT_EQ(bench.engine.logprobs_parts(), part);
    EXPECT_EQ(consumer.result(), nullptr);
  }
  EXPECT_EQ(Step(*pass), Next::kOver);
  ASSERT_NE(consumer.result(), nullptr);
  ASSERT_EQ(consumer.result()->prompt_logprobs_size(), 41);
  ASSERT_EQ(consumer.result()->best_logprobs_size(), 41);
  for (int i = 0; i < 41; ++i) EXPECT_EQ(consumer.result()->prompt_logprobs(i), -i);
}

TEST(PrefillPass, APromptOfOneTokenHasNoLogprobs) {
  Bench bench;
  const auto job = NewGradedJob(bench, 1);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  Finish(bench, *pass);
  ASSERT_NE(consumer.result(), nullptr);
  EXPECT_EQ(consumer.result()->prompt_logprobs_size(), 0);
}

TEST(PrefillPass, LogprobsEndWithTheirRequest) {
  Bench bench;
  const auto job = NewGradedJob(bench, 42);
  const auto pass = bench.NewPass({job});
  StepToFirstTokens(bench, *pass);
  Step(*pass);
  job->OnCallCancelled();
  EXPECT_EQ(Step(*pass), Next::kOver);
  EXPECT_EQ(bench.engine.logprobs_parts(), 1);
}

TEST(PrefillPass, AResultDoesNotWaitForAnotherPromptsLogprobs) {
  Bench bench({.max_batch_tokens = 1000});
  const auto graded = NewGradedJob(bench, 42), plain = bench.NewJob(30);
  Consumer to_graded(graded), to_plain(plain);
  const auto pass = bench.NewPass({graded, plain});
  StepToFirstTokens(bench, *pass);
  Step(*pass);
  EXPECT_EQ(bench.engine.logprobs_parts(), 1);
  EXPECT_NE(to_plain.result(), nullptr);
  Finish(bench, *pass);
  EXPECT_NE(to_graded.result(), nullptr);
}

// The first layer does not count, and the prediction counts as much as four of the others.
TEST(PrefillPass, PredictsLogprobsByTheLayersAndThenByThoseThatItHas) {
  Bench bench;
  const auto job = NewGradedJob(bench, 41);
  absl::Duration step = absl::Seconds(100);
  bench.engine.set_on_layer([&](int64_t) { bench.clock.Advance(step); });
  const auto pass = bench.NewPass({job});
  const auto expect_remaining = [&](double seconds) {
    EXPECT_NEAR(absl::ToDoubleSeconds(pass->Remaining(absl::Seconds(41))), seconds, 1e-6);
  };
  expect_remaining(4 * 41 + 40);
  Step(*pass);
  expect_remaining(3 * 41 + 40);
  step = absl::Seconds(1);
  Step(*pass);
  expect_remaining((4 * 41 + 1) / 5. * (2 + 40 / 41.));
  StepToFirstTokens(bench, *pass);
  step = absl::Seconds(5);
  Step(*pass);
  expect_remaining(3 * 5);
  Finish(bench, *pass);
  expect_remaining(0);
}

TEST(PrefillPass, ALastLayerOfOneQueryIsNoneToPredictOrToLearnFrom) {
  Bench bench({.last_query_alone = true});
  bench.engine.set_on_layer([&](int64_t) { bench.clock.Advance(absl::Seconds(2)); });
  for (const bool graded : {false, true}) {
    const auto job = graded ? NewGradedJob(bench, 41) : bench.NewJob(41);
    Consumer consumer(job);
    const auto pass = bench.NewPass({job});
    for (int layer = 0; layer < 4; ++layer) {
      const int left = (graded ? 4 : 3) - layer;
      const absl::Duration logprobs = graded ? absl::Seconds(2) * 40 / 41 : absl::ZeroDuration();
      EXPECT_NEAR(absl::ToDoubleSeconds(pass->Remaining(absl::Seconds(2))),
                  absl::ToDoubleSeconds(left * absl::Seconds(2) + logprobs), 1e-6);
      const auto report = pass->Step();
      ASSERT_TRUE(report.ok()) << report.status();
      EXPECT_EQ(report->layer.has_value(), graded || layer < 3) << layer;
      bench.PackAll();
    }
    Finish(bench, *pass);
  }
}

TEST(PrefillPass, SendsAResultWithTheStepOfTheFirstToken) {
  Bench bench;
  const auto job = bench.NewJob(100);
  Consumer consumer(job);
  const auto pass = bench.NewPass({job});
  for (int layer = 0; layer < 4; ++layer) {
    EXPECT_EQ(Step(*pass), Next::kAnotherStep);
    bench.PackAll();
  }
  EXPECT_TRUE(pass->uses_device());
  EXPECT_EQ(Step(*pass), Next::kAnotherStep);
  EXPECT_NE(consumer.result(), nullptr);
  EXPECT_FALSE(pass->uses_device());
}

TEST(PrefillPass, TellsAFailureOfTheDevice) {
  Bench bench;
  const auto job = bench.NewJob(20);
  const auto pass = bench.NewPass({job});
  Step(*pass);
  bench.engine.FailFrom(1, absl::InternalError("an illegal memory access"));
  EXPECT_EQ(pass->Step().status(), absl::InternalError("an illegal memory access"));
  EXPECT_FALSE(job->ended()) << "who runs the pass ends its requests";
}

}  // namespace
}  // namespace prefilld::server
