// Tests the simulator against what can be computed by hand.
#include "tests/bench/simulator/simulation.h"

#include <gmock/gmock.h>

namespace prefilld::bench {
namespace {

using client::LoadEnd;
using client::LoadRequest;
using model::AttentionPolicy;
using ::testing::HasSubstr;

// A layer of a token takes 10 us, with four layers; the last one half of that. The first token
// takes 1 ms, and a request 2 ms more.
ServerProfile Profile() {
  ServerProfile profile;
  profile.num_layers = 4;
  profile.max_tokens = 100'000;
  profile.crossover_tokens = 100'000;
  profile.cache_block_bytes = 1000;
  profile.places = {100'000, 4096};
  profile.interject_tokens = 1000;
  profile.part_tokens = 1000;
  profile.attention_part_us = 1000;
  profile.request_us = 2000;
  for (const int64_t num_tokens : {1000, 10'000, 100'000}) {
    const double layer_us = 10.0 * static_cast<double>(num_tokens);
    profile.prompts.push_back(
        {AttentionPolicy::kDense, num_tokens, layer_us, 0.5 * layer_us, 1000});
  }
  return profile;
}

double FirstTokenMs(const std::vector<LoadEnd>& ends, int64_t num_tokens) {
  for (const LoadEnd& end : ends) {
    if (end.request.num_tokens == num_tokens && end.first_token.has_value()) {
      return absl::ToDoubleMilliseconds(*end.first_token);
    }
  }
  return -1;
}

TEST(Simulation, APromptAloneTakesItsLayersAndItsFirstToken) {
  const auto ends = Simulate(Profile(), {{.arrival = absl::Seconds(1), .num_tokens = 2000}}, {});
  ASSERT_TRUE(ends.ok()) << ends.status();
  ASSERT_EQ(ends->size(), 1);
  EXPECT_EQ((*ends)[0].code, absl::StatusCode::kOk);
  EXPECT_NEAR(FirstTokenMs(*ends, 2000), 3 * 20 + 10 + 1 + 2, 0.01);
}

TEST(Simulation, TheFirstLayerOfALengthThatIsNewTakesLonger) {
  ServerProfile profile = Profile();
  for (MeasuredPrompt& prompt : profile.prompts) prompt.first_layer_us = prompt.layer_us + 7000;
  const auto ends = Simulate(profile,
                             {{.num_tokens = 2000},
                              {.arrival = absl::Seconds(1), .num_tokens = 3000},
                              {.arrival = absl::Seconds(2), .num_tokens = 2000}},
                             {});
  ASSERT_TRUE(ends.ok()) << ends.status();
  const double alone = 3.5 * 20 + 1 + 2;
  EXPECT_NEAR(absl::ToDoubleMilliseconds(*(*ends)[0].first_token), alone + 7, 0.01);
  EXPECT_NEAR(absl::ToDoubleMilliseconds(*(*ends)[1].first_token), 3.5 * 30 + 1 + 2 + 7, 0.01);
  EXPECT_NEAR(absl::ToDoubleMilliseconds(*(*ends)[2].first_token), alone, 0.01);
}

TEST(Simulation, TheFirstTokenTakesWhatItTakesForItsLength) {
  ServerProfile profile = Profile();
  profile.prompts.back().first_token_us = 10'000;  // of 100,000 tokens
  const auto ends = Simulate(
      profile, {{.num_tokens = 2000}, {.arrival = absl::Seconds(9), .num_tokens = 55'000}}, {});
  ASSERT_TRUE(ends.ok()) << ends.status();
  EXPECT_NEAR(FirstTokenMs(*ends, 2000), 3.5 * 20 + 1 + 2, 0.01);
  EXPECT_NEAR(FirstTokenMs(*ends, 55'000), 3.5 * 550 + 5.5 + 2, 0.01);
}

// A layer of the long prompt takes 500 ms, in parts of 2 and 8 ms.
TEST(Simulation, AShortPromptGoesFirstInsideALayerUnlessFirstComeIsFirstServed) {
  const std::vector<LoadRequest> requests = {
      {.num_tokens = 50'000}, {.arrival = absl::Milliseconds(700), .num_tokens = 800}};
  const double alone = 3.5 * 8 + 1 + 2;
  const auto turns = Simulate(Profile(), requests, {});
  ASSERT_TRUE(turns.ok()) << turns.status();
  EXPECT_NEAR(FirstTokenMs(*turns, 800), alone, 8.1);
  EXPECT_NEAR(FirstTokenMs(*turns, 50'000), 3.5 * 500 + 1 + 2 + alone - 2, 0.5);

  const auto fifo = Simulate(Profile(), requests, {.scheduling = server::Scheduling::kFifo});
  ASSERT_TRUE(fifo.ok()) << fifo.status();
  EXPECT_NEAR(FirstTokenMs(*fifo, 50'000), 3.5 * 500 + 1 + 2, 0.01);
  EXPECT_NEAR(FirstTokenMs(*fifo, 800), 3.5 * 500 + 1 - 700 + alone, 0.01);
}

// At a point of a device that works ahead of the host, the next part is under way.
TEST(Simulation, WhoGoesFirstInsideALayerWaitsForThePartThatIsQueued) {
  ServerProfile profile = Profile();
  // The long prompt's layer is one part before attention of 100 ms, and one behind it of 400 ms.
  profile.part_tokens = 50'000;
  const std::vector<LoadRequest> requests = {
      {.num_tokens = 50'000}, {.arrival = absl::Milliseconds(50), .num_tokens = 800}};
  const double alone = 3.5 * 8 + 1 + 2;
  const auto idle = Simulate(profile, requests, {});
  ASSERT_TRUE(idle.ok()) << idle.status();
  EXPECT_NEAR(FirstTokenMs(*idle, 800), alone + 50, 0.1);
  profile.queues_ahead = true;
  const auto ahead = Simulate(profile, requests, {});
  ASSERT_TRUE(ahead.ok()) << ahead.status();
  EXPECT_NEAR(FirstTokenMs(*ahead, 800), alone + 450, 0.1);
  EXPECT_NEAR(FirstTokenMs(*ahead, 50'000), FirstTokenMs(*idle, 50'000), 0.1);
}

TEST(Simulation, ACachedBeginningIsNotComputed) {
  const std::vector<LoadRequest> requests = {
      {.num_tokens = 10'240, .prefix = "x", .prefix_tokens = 10'240},
      {.arrival = absl::Seconds(10), .num_tokens = 12'288, .prefix = "x", .prefix_tokens = 12'288}};
  const auto cold = Simulate(Profile(), requests, {});
  ASSERT_TRUE(cold.ok()) << cold.status();
  EXPECT_NEAR(FirstTokenMs(*cold, 12'288), 3.5 * 122.88 + 3, 0.1);
  const auto cached = Simulate(Profile(), requests, {.prefix_cache_bytes = 1'000'000});
  ASSERT_TRUE(cached.ok()) << cached.status();
  EXPECT_EQ((*cached)[1].cached_tokens, 10'240);
  EXPECT_NEAR(FirstTokenMs(*cached, 12'288), 3.5 * 20.48 + 3, 0.1);
}

TEST(Simulation, TheQueueRefusesWhatItDoes) {
  std::vector<LoadRequest> requests(4, {.num_tokens = 50'000});
  const auto ends = Simulate(Profile(), requests, {.queue_capacity = 1});
  ASSERT_TRUE(ends.ok()) << ends.status();
  ASSERT_EQ(ends->size(), 4);
  int refused = 0;
  for (const LoadEnd& end : *ends) {
    refused += end.code == absl::StatusCode::kResourceExhausted ? 1 : 0;
  }
  EXPECT_EQ(refused, 2) << "one is about to compute, and one waits";
}

TEST(Simulation, PromptsThatAreTooLongAndStrangersAreRefused) {
  SimulationOptions options;
  options.has_tenants = true;
  options.tenants = *server::Tenants::Parse(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  const auto ends = Simulate(Profile(),
                             {{.num_tokens = 100'001, .tenant = "a"},
                              {.num_tokens = 5, .tenant = "b"},
                              {.num_tokens = 6, .tenant = "a"}},
                             options);
  ASSERT_TRUE(ends.ok()) << ends.status();
  EXPECT_EQ((*ends)[0].code, absl::StatusCode::kInvalidArgument);
  EXPECT_EQ((*ends)[1].code, absl::StatusCode::kUnauthenticated);
  EXPECT_EQ((*ends)[2].code, absl::StatusCode::kOk);
}

TEST(Simulation, ShortPromptsThatWaitShareAPass) {
  ServerProfile profile = Profile();
  profile.max_batch_tokens = 2048;
  const std::vector<LoadRequest> requests = {
      {.num_tokens = 50'000},
      {.arrival = absl::Milliseconds(10), .num_tokens = 128},
      {.arrival = absl::Milliseconds(10), .num_tokens = 256}};
  const auto ends = Simulate(profile, requests, {});
  ASSERT_TRUE(ends.ok()) << ends.status();
  // All four layers of both are whole, because each prompt's last query is another row.
  EXPECT_NEAR(FirstTokenMs(*ends, 128), 4 * 3.84 + 1 + 2, 8.1);
  EXPECT_DOUBLE_EQ(FirstTokenMs(*ends, 128), FirstTokenMs(*ends, 256));
}

TEST(ServerProfile, NamesTheFieldThatIsWrong) {
  const std::string text = R"({"num_layers": 8, "max_tokens": 1000, "crossover_tokens": 500,
    "cache_block_bytes": 0, "places": [1000], "max_batch_tokens": 0, "interject_tokens": 10,
    "part_tokens": 512, "attention_part_us": 1000, "queues_ahead": true, "request_us": 100.5, "prompts": [{"policy": "dense", "num_tokens": 64,
    "layer_us": 10, "last_layer_us": 5, "first_token_us": 1}]})";
  const auto profile = ParseProfile(text);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->request_us, 100.5);
  EXPECT_EQ(profile->prompts[0].last_layer_us, 5);
  EXPECT_EQ(profile->prompts[0].first_layer_us, 10) << "that of all layers, where there is none";
  const auto problem = [&](const std::string& from, const std::string& to) {
    std::string other = text;
    other.replace(other.find(from), from.size(), to);
    return std::string(ParseProfile(other).status().message());
  };
  EXPECT_EQ(problem("\"num_layers\": 8", "\"num_layers\": 0"),
            "num_layers is no whole number of at least 1");
  EXPECT_EQ(problem("[1000]", "[]"), "places is no list of numbers of tokens");
  EXPECT_THAT(problem("dense", "denser"), HasSubstr("prompts[0].policy is not one of"));
  EXPECT_EQ(problem("\"layer_us\": 10", "\"layer_us\": -1"),
            "prompts[0].layer_us is no number of at least 0");
  EXPECT_EQ(ParseProfile("[").status().message(), "it is no JSON object");
}

}  // namespace
}  // namespace prefilld::bench
