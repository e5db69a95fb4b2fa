#include "server/fair_shares.h"

#include <algorithm>
#include <random>

#include <gmock/gmock.h>

#include "server/turns.h"

namespace prefilld::server {
namespace {

constexpr absl::Time kNow = absl::FromUnixSeconds(1'000'000'000);
constexpr Claimant kA = {.tenant = 0};
constexpr Claimant kB = {.tenant = 1};

TEST(FairShares, TimeGoesByTheWeight) {
  FairShares shares({1, 4});
  shares.SetClaimants({kA, kB}, kNow);
  shares.Charge(kA, absl::Seconds(2));
  shares.Charge(kB, absl::Seconds(2));
  EXPECT_EQ(shares.virtual_time(kA), absl::Seconds(2));
  EXPECT_EQ(shares.virtual_time(kB), absl::Milliseconds(500));
}

TEST(FairShares, NewWeightsHoldFromThenOnAndNewTenantsJoinThoseWhoWereThere) {
  FairShares shares({1});
  shares.SetClaimants({kA}, kNow);
  shares.Charge(kA, absl::Seconds(2));
  shares.SetWeights({2, 1});
  shares.SetClaimants({kA, kB}, kNow);
  EXPECT_EQ(shares.virtual_time(kA), absl::Seconds(2)) << "what was used stays";
  EXPECT_EQ(shares.virtual_time(kB), absl::Seconds(2));
  shares.Charge(kA, absl::Seconds(2));
  EXPECT_EQ(shares.virtual_time(kA), absl::Seconds(3));
}

TEST(FairShares, WhoWasIdleJoinsThoseWhoWereNot) {
  FairShares shares({1, 1, 1});
  const Claimant c = {.tenant = 2};
  shares.SetClaimants({kA, kB}, kNow);
  shares.Charge(kA, absl::Seconds(10));
  shares.Charge(kB, absl::Seconds(7));
  shares.SetClaimants({kA, kB, c}, kNow);
  EXPECT_EQ(shares.virtual_time(c), absl::Seconds(7)) << "the least of the others";
}

TEST(FairShares, WhatWasUsedAloneIsNotHeldAgainstAnyone) {
  FairShares shares({1, 1});
  shares.SetClaimants({kA}, kNow);
  shares.Charge(kA, absl::Seconds(100));
  shares.SetClaimants({kA, kB}, kNow);
  EXPECT_EQ(shares.virtual_time(kA), shares.virtual_time(kB));
}

TEST(FairShares, AShortPauseDoesNotForgiveWhatWasUsed) {
  FairShares shares({1, 1});
  shares.SetClaimants({kA, kB}, kNow);
  shares.Charge(kA, absl::Seconds(5));
  shares.SetClaimants({kB}, kNow);
  shares.SetClaimants({kA, kB}, kNow);
  EXPECT_EQ(shares.virtual_time(kA), absl::Seconds(5));
  EXPECT_EQ(shares.virtual_time(kB), absl::ZeroDuration());
}

TEST(FairShares, AClassThatIsIdleForgets) {
  FairShares shares({1, 1});
  shares.SetClaimants({kA, kB}, kNow);
  shares.Charge(kA, absl::Seconds(5));
  shares.SetClaimants({}, kNow);
  shares.SetClaimants({kA, kB}, kNow);
  EXPECT_EQ(shares.virtual_time(kA), absl::ZeroDuration());
}

TEST(FairShares, ClassesKeepTheirTimesApart) {
  FairShares shares({1});
  const Claimant urgent = {.priority = kMaxPriority, .tenant = 0};
  const Claimant leisurely = {.priority = -kMaxPriority, .tenant = 0};
  shares.SetClaimants({urgent, leisurely}, kNow);
  shares.Charge(urgent, absl::Seconds(1));
  EXPECT_EQ(shares.virtual_time(leisurely), absl::ZeroDuration());
  shares.EndStep(kMaxPriority, kNow + absl::Seconds(3), absl::Seconds(2));
  EXPECT_EQ(shares.class_step(kMaxPriority), absl::Seconds(2));
  EXPECT_EQ(shares.class_step(-kMaxPriority), absl::ZeroDuration());
  EXPECT_EQ(shares.class_waited(kMaxPriority, kNow + absl::Seconds(4)), absl::Seconds(1));
  EXPECT_EQ(shares.class_waited(-kMaxPriority, kNow + absl::Seconds(4)), absl::Seconds(4));
}

TEST(FairShares, AClassDoesNotAgeWhileNobodyOfItWaits) {
  FairShares shares({1});
  shares.SetClaimants({}, kNow);
  shares.SetClaimants({kA}, kNow + absl::Seconds(60));
  EXPECT_EQ(shares.class_waited(0, kNow + absl::Seconds(61)), absl::Seconds(1));
}

struct Prompt {
  Claimant claimant;
  absl::Duration step;
  int steps_left = 1;
  absl::Time last_step_at;
};

// A device whose steps are chosen by the rules under test.
class Trace {
 public:
  Trace(unsigned seed, std::vector<double> weights)
      : random_(seed), used_(weights.size()), shares_(std::move(weights)) {}

  int Draw(int low, int high) { return low + static_cast<int>(random_() % (high - low + 1)); }
  void Add(const Claimant& claimant, int steps) {
    prompts_.push_back({claimant, absl::Milliseconds(Draw(500, 1000)), steps, now_});
  }
  // Computes one step and returns the position of its prompt, whose steps_left may be 0 now.
  size_t Step() {
    std::vector<Claimant> claimants;
    for (const Prompt& prompt : prompts_) claimants.push_back(prompt.claimant);
    shares_.SetClaimants(claimants, now_);
    std::vector<Contender> contenders;
    for (const Prompt& prompt : prompts_) {
      contenders.push_back({.priority = prompt.claimant.priority,
                            .class_waited = shares_.class_waited(prompt.claimant.priority, now_),
                            .class_step = shares_.class_step(prompt.claimant.priority),
                            .tenant_time = shares_.virtual_time(prompt.claimant),
                            .remaining = prompt.steps_left * prompt.step,
                            .waited = now_ - prompt.last_step_at});
    }
    const size_t next = OrderOfTurns(contenders).front();
    Prompt& prompt = prompts_[next];
    now_ += prompt.step;
    used_[static_cast<size_t>(prompt.claimant.tenant)] += prompt.step;
    shares_.Charge(prompt.claimant, prompt.step);
    shares_.EndStep(prompt.claimant.priority, now_, prompt.step);
    prompt.last_step_at = now_;
    --prompt.steps_left;
    return next;
  }
  std::vector<Prompt>& prompts() { return prompts_; }
  absl::Time now() const { return now_; }
  absl::Duration used(size_t tenant) const { return used_[tenant]; }

 private:
  std::mt19937 random_;
  absl::Time now_ = kNow;
  std::vector<Prompt> prompts_;
  std::vector<absl::Duration> used_;  // [tenants]
  FairShares shares_;
};

// One prompt stands among eight others, and whenever one of those is done another one comes, of a
// random tenant and class. Checks that it is done within a bound that is far off, and that no flood
// can move. Prompts of its class take the class's steps, which come at least once in
// kClassPatience, or ten steps of a second, and one step of each class. Tenants take turns in them
// by weights of 1 to 4 and steps of 0.5 to 1 s, so at most 3 * (2 * 4 + 2) steps go by for one of
// its tenant, and then those of its tenant take turns, nine at most.
void RunTrace(unsigned seed) {
  constexpr int kClasses = 3;
  std::mt19937 random(seed);
  std::vector<double> weights;
  for (int i = 0; i < 3; ++i) weights.push_back(1 + static_cast<double>(random() % 4));
  Trace trace(seed, weights);
  // Most of the flood is of the highest class, and in a third of the traces all of it.
  const int tenths_of_highest = trace.Draw(8, 10);
  const auto flood = [&] {
    const int priority =
        trace.Draw(1, 10) <= tenths_of_highest ? kClasses - 1 : trace.Draw(0, kClasses - 1);
    trace.Add({.priority = priority, .tenant = trace.Draw(0, 2)}, trace.Draw(1, 4));
  };
  const int steps = trace.Draw(1, 4);
  trace.Add({.priority = trace.Draw(0, kClasses - 1), .tenant = trace.Draw(0, 2)}, steps);
  for (int i = 0; i < 8; ++i) flood();
  const absl::Duration class_step =
      std::max(kClassPatience, kClassPatienceSteps * absl::Seconds(1)) +
      kClasses * absl::Seconds(1);
  const absl::Time bound = trace.now() + steps * (3 * (2 * 4 + 2)) * 9 * class_step;
  while (trace.prompts().front().steps_left > 0) {
    const size_t next = trace.Step();
    ASSERT_LT(trace.now(), bound) << "seed " << seed;
    if (next == 0 || trace.prompts()[next].steps_left > 0) continue;
    trace.prompts().erase(trace.prompts().begin() + static_cast<std::ptrdiff_t>(next));
    flood();
  }
}

TEST(FairTurns, StarveNobodyInTenThousandRandomTraces) {
  for (unsigned seed = 0; seed < 10'000; ++seed) {
    RunTrace(seed);
    if (HasFatalFailure()) return;
  }
}

TEST(FairTurns, DivideTheDeviceByTheWeightsHoweverManyPromptsATenantHas) {
  Trace trace(1, {3, 1});
  for (int i = 0; i < 2; ++i) trace.Add(kA, 1'000'000);
  for (int i = 0; i < 40; ++i) trace.Add(kB, 1'000'000);
  for (int i = 0; i < 2000; ++i) trace.Step();
  EXPECT_NEAR(absl::FDivDuration(trace.used(0), trace.used(1)), 3, 0.02);
}

TEST(FairTurns, GiveAllToATenantWhoIsAlone) {
  Trace trace(1, {1, 1000});
  trace.Add(kA, 100);
  const absl::Time start = trace.now();
  for (int i = 0; i < 100; ++i) trace.Step();
  EXPECT_EQ(trace.used(0), trace.now() - start);
}

TEST(FairTurns, AClassThatNeverEndsLeavesTheOthersAStepInEveryPatience) {
  Trace trace(1, {1, 1});
  trace.Add({.priority = 1, .tenant = 0}, 1'000'000);
  trace.Add(kB, 1'000'000);
  const absl::Duration step = trace.prompts()[1].step;
  const absl::Time start = trace.now();
  while (trace.now() < start + absl::Seconds(600)) trace.Step();
  const int steps = 1'000'000 - trace.prompts()[1].steps_left;
  // Steps take half a second to one second.
  const absl::Duration patience = std::max(kClassPatience, kClassPatienceSteps * step);
  EXPECT_GE(steps, 600 / (absl::ToDoubleSeconds(patience) + 2))
      << "patience, the step that it waits for, and its own";
  EXPECT_LE(steps, 600 / absl::ToDoubleSeconds(patience));
}

}  // namespace
}  // namespace prefilld::server
