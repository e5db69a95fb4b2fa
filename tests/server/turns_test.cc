#include "server/turns.h"

#include <algorithm>
#include <random>

#include <gmock/gmock.h>

namespace prefilld::server {
namespace {

using ::testing::ElementsAre;

TEST(OrderOfTurns, PutsTheLeastRemainingTimeFirst) {
  EXPECT_THAT(OrderOfTurns({{.remaining = absl::Seconds(3)},
                            {.remaining = absl::Seconds(1)},
                            {.remaining = absl::Seconds(2)}}),
              ElementsAre(1, 2, 0));
}

TEST(OrderOfTurns, KeepsTheOrderOfEquals) {
  EXPECT_THAT(OrderOfTurns({{.remaining = absl::Seconds(1)}, {.remaining = absl::Seconds(1)}}),
              ElementsAre(0, 1));
}

TEST(OrderOfTurns, CountsATwentiethOfTheWait) {
  const Contender waited = {.remaining = absl::Seconds(4), .waited = absl::Seconds(70)};
  EXPECT_THAT(OrderOfTurns({waited, {.remaining = absl::Milliseconds(400)}}), ElementsAre(1, 0));
  EXPECT_THAT(OrderOfTurns({waited, {.remaining = absl::Milliseconds(600)}}), ElementsAre(0, 1));
}

TEST(OrderOfTurns, PutsTheLeastTimeOfATenantBeforeTheLeastRemainingTime) {
  EXPECT_THAT(OrderOfTurns({{.tenant_time = absl::Seconds(2), .remaining = absl::Seconds(1)},
                            {.tenant_time = absl::Seconds(1), .remaining = absl::Seconds(9)},
                            {.tenant_time = absl::Seconds(1), .remaining = absl::Seconds(8)}}),
              ElementsAre(2, 1, 0));
}

TEST(OrderOfTurns, PutsHigherClassesBeforeAllElse) {
  EXPECT_THAT(OrderOfTurns({{.priority = -1},
                            {.priority = 0},
                            {.priority = 1, .tenant_time = absl::Seconds(9)},
                            {.priority = 0, .waited = absl::Hours(1)}}),
              ElementsAre(2, 3, 1, 0));
}

TEST(OrderOfTurns, PutsAClassThatLostItsPatienceFirst) {
  const absl::Duration impatient = kClassPatience + absl::Milliseconds(1);
  EXPECT_THAT(
      OrderOfTurns({{.priority = 1, .class_waited = kClassPatience},
                    {.priority = 0, .class_waited = impatient},
                    {.priority = -1, .class_waited = 2 * impatient},
                    {.priority = 0, .class_waited = impatient, .remaining = -absl::Seconds(1)}}),
      ElementsAre(2, 3, 1, 0));
}

TEST(OrderOfTurns, LetsAClassOfLongStepsWaitForTenOfThem) {
  const Contender high = {.priority = 1, .class_waited = absl::Seconds(1)};
  const absl::Duration step = absl::Seconds(4);
  Contender low = {.class_waited = 10 * step, .class_step = step};
  EXPECT_THAT(OrderOfTurns({low, high}), ElementsAre(1, 0));
  low.class_waited += absl::Milliseconds(1);
  EXPECT_THAT(OrderOfTurns({high, low}), ElementsAre(1, 0));
  // One that is overdue goes before one that has waited longer and is not.
  const Contender patient = {.class_waited = absl::Seconds(30), .class_step = step};
  const Contender overdue = {.priority = -1, .class_waited = absl::Seconds(6)};
  EXPECT_THAT(OrderOfTurns({patient, overdue, high}), ElementsAre(1, 2, 0));
}

TEST(OrderOf, FifoPutsTheOldestFirstWhateverElseItIs) {
  const std::vector<Contender> contenders = {
      {.priority = 1, .age = absl::Seconds(1)},
      {.tenant_time = absl::Seconds(9), .remaining = absl::Seconds(9), .age = absl::Seconds(3)},
      {.priority = -1, .age = absl::Seconds(2)}};
  EXPECT_THAT(OrderOf(Scheduling::kFifo, contenders), ElementsAre(1, 2, 0));
  EXPECT_THAT(OrderOf(Scheduling::kTurns, contenders), ElementsAre(0, 1, 2));
}

TEST(GoesBefore, FindsTheFirstOfTheOrderWithoutSorting) {
  std::mt19937 random(1);
  for (int i = 0; i < 1000; ++i) {
    std::vector<Contender> contenders(1 + random() % 20);
    for (Contender& contender : contenders) {
      contender = {.priority = static_cast<int>(random() % 2),
                   .class_waited = absl::Seconds(random() % 3 * 4),
                   .class_step = absl::Seconds(random() % 2),
                   .tenant_time = absl::Seconds(random() % 2),
                   .remaining = absl::Seconds(random() % 5),
                   .waited = absl::Seconds(random() % 5),
                   .age = absl::Seconds(random() % 5)};
    }
    for (const Scheduling scheduling : {Scheduling::kTurns, Scheduling::kFifo}) {
      size_t first = 0;
      for (size_t j = 1; j < contenders.size(); ++j) {
        if (GoesBefore(scheduling, contenders[j], contenders[first])) first = j;
      }
      EXPECT_EQ(first, OrderOf(scheduling, contenders).front());
    }
  }
}

// Who has waited for so many times its remaining time is the next, but for others who have.
constexpr double kLongest = 1 / kAgeing;

struct Prompt {
  absl::Duration step;
  int steps_left;
  absl::Time last_step_at;
  size_t others = 0;    // that were there when it had waited for kLongest of its remaining time
  size_t preceded = 0;  // steps of others since then

  Contender AsContender(absl::Time now) const {
    return {.remaining = steps_left * step, .waited = now - last_step_at};
  }
};

// Runs prompts of random lengths that come faster than they can be computed. Checks the bound that
// the header states.
void RunTrace(unsigned seed) {
  std::mt19937 random(seed);
  std::lognormal_distribution<double> step_ms(1.0, 1.5);
  std::vector<Prompt> prompts;
  absl::Time now = absl::UnixEpoch();
  const auto arrive = [&] {
    prompts.push_back({absl::Milliseconds(1 + std::min(step_ms(random), 500.0)),
                       static_cast<int>(2 + random() % 6), now});
  };
  arrive();
  for (int i = 0; i < 60 && !prompts.empty(); ++i) {
    if (i < 30 && (random() % 3 != 0 || prompts.size() < 3)) arrive();
    std::vector<Contender> contenders;
    for (const Prompt& prompt : prompts) contenders.push_back(prompt.AsContender(now));
    const size_t next = OrderOfTurns(contenders).front();
    const absl::Duration step = prompts[next].step;
    for (size_t j = 0; j < prompts.size(); ++j) {
      if (j == next || contenders[j].waited <= kLongest * contenders[j].remaining) continue;
      // One that goes before it has waited for longer, in proportion, so it goes but once.
      ASSERT_GT(contenders[next].waited, kLongest * contenders[next].remaining) << "seed " << seed;
      if (prompts[j].preceded++ == 0) prompts[j].others = prompts.size();
      ASSERT_LT(prompts[j].preceded, prompts[j].others) << "seed " << seed;
    }
    now += step;
    prompts[next].last_step_at = now;
    prompts[next].preceded = 0;
    if (--prompts[next].steps_left == 0) prompts.erase(prompts.begin() + next);
  }
}

TEST(OrderOfTurns, StarvesNobodyInTenThousandRandomTraces) {
  for (unsigned seed = 0; seed < 10'000; ++seed) {
    RunTrace(seed);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace prefilld::server
