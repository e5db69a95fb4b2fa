// Tests that whoever follows a prefix cache holds what it holds.
#include "model/prefill/prefix_events.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/prefix_cache.h"

namespace prefilld::model {
namespace {

using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr size_t kAll = 1000;

AttentionOptions With(AttentionPolicy policy) {
  AttentionOptions options;
  options.policy = policy;
  return options;
}

// A cache whose prompts have blocks that consist of one token each.
class PrefixEvents : public ::testing::Test {
 protected:
  void Compute(const std::vector<uint32_t>& ids, AttentionPolicy policy = AttentionPolicy::kDense,
               bool is_private = false) {
    std::vector<uint32_t> tokens;
    for (const uint32_t id : ids) tokens.insert(tokens.end(), kPrefixBlockTokens, id);
    cache_.Take({"domain", tokens, With(policy), is_private}).Publish();
  }

  PrefixCache cache_{/*num_slots=*/4, PrefixReuseRule::kLooser, Xxh3PrefixHash, /*num_events=*/8};
};

// The picture that a follower has.
class Picture {
 public:
  void Apply(const PrefixFollower::Batch& batch) {
    for (const PrefixEvent& event : batch.events) {
      if (!event.stored) {
        blocks_.erase(event.key);
        continue;
      }
      EXPECT_TRUE(!event.parent.has_value() || blocks_.contains(*event.parent))
          << "a block came before its parent";
      blocks_[event.key] = event;
    }
    last_ = batch.last;
  }
  // Applies all that there is now, in batches of `most`.
  absl::Status CatchUp(PrefixFollower& follower, size_t most = kAll) {
    while (true) {
      const auto batch = follower.Next(most);
      if (!batch.ok()) return batch.status();
      if (!batch->has_value()) return absl::OkStatus();
      EXPECT_LE((*batch)->events.size(), most);
      Apply(**batch);
    }
  }
  std::vector<uint32_t> first_tokens() const {
    std::vector<uint32_t> tokens;
    for (const auto& [key, event] : blocks_) tokens.push_back(event.tokens[0]);
    std::sort(tokens.begin(), tokens.end());
    return tokens;
  }
  const std::map<PrefixKey, PrefixEvent>& blocks() const { return blocks_; }
  uint64_t last() const { return last_; }

 private:
  std::map<PrefixKey, PrefixEvent> blocks_;
  uint64_t last_ = 0;
};

using ::testing::ElementsAre;

TEST_F(PrefixEvents, ASnapshotComesFirstAndThenTheChanges) {
  Compute({1, 2});
  PrefixFollower follower(cache_);
  auto batch = *follower.Next(kAll);
  ASSERT_TRUE(batch.has_value());
  EXPECT_TRUE(batch->in_snapshot);
  EXPECT_EQ(batch->last, 2);
  ASSERT_THAT(batch->events, SizeIs(2));
  EXPECT_EQ(batch->events[0].parent, std::nullopt);
  EXPECT_EQ(batch->events[1].parent, batch->events[0].key);
  EXPECT_EQ(batch->events[1].tokens[127], 2);
  const PrefixKey leaf = batch->events[1].key;

  batch = *follower.Next(kAll);
  ASSERT_TRUE(batch.has_value()) << "the end of the snapshot";
  EXPECT_FALSE(batch->in_snapshot);
  EXPECT_THAT(batch->events, IsEmpty());
  EXPECT_FALSE((*follower.Next(kAll)).has_value());

  Compute({1, 3, 4, 5});  // takes the last two slots, and the one of block 2
  batch = *follower.Next(kAll);
  ASSERT_TRUE(batch.has_value());
  ASSERT_THAT(batch->events, SizeIs(4));
  EXPECT_FALSE(batch->events[0].stored);
  EXPECT_EQ(batch->events[0].key, leaf);
  EXPECT_EQ(batch->events[3].tokens[0], 5);
  EXPECT_EQ(batch->last, 6);
}

TEST_F(PrefixEvents, AnEmptyCacheHasAnEmptySnapshot) {
  PrefixFollower follower(cache_);
  const auto batch = *follower.Next(kAll);
  ASSERT_TRUE(batch.has_value());
  EXPECT_FALSE(batch->in_snapshot);
  EXPECT_THAT(batch->events, IsEmpty());
}

TEST_F(PrefixEvents, ChangesDuringASnapshotAreNotLost) {
  Compute({1, 2, 3});
  PrefixFollower follower(cache_);
  Picture picture;
  picture.Apply(**follower.Next(1));
  Compute({1, 4});  // takes the last slot
  Compute({5, 6});  // takes those of the leaves that nobody used for longest
  EXPECT_TRUE(picture.CatchUp(follower, 1).ok());
  Picture fresh;
  PrefixFollower another(cache_);
  EXPECT_TRUE(fresh.CatchUp(another).ok());
  EXPECT_EQ(picture.first_tokens(), fresh.first_tokens());
  EXPECT_THAT(fresh.first_tokens(), SizeIs(4));
  EXPECT_EQ(picture.last(), cache_.last_event());
}

TEST_F(PrefixEvents, ABlockThatIsComputedAnewIsToldAgain) {
  Compute({1}, AttentionPolicy::kShare);
  PrefixFollower follower(cache_);
  Picture picture;
  EXPECT_TRUE(picture.CatchUp(follower).ok());
  EXPECT_EQ(picture.blocks().begin()->second.policy, AttentionPolicy::kShare);
  Compute({1}, AttentionPolicy::kDense);
  EXPECT_TRUE(picture.CatchUp(follower).ok());
  ASSERT_THAT(picture.blocks(), SizeIs(1));
  EXPECT_EQ(picture.blocks().begin()->second.policy, AttentionPolicy::kDense);
}

TEST_F(PrefixEvents, APrivatePromptSaysSo) {
  Compute({1}, AttentionPolicy::kDense, /*is_private=*/true);
  PrefixFollower follower(cache_);
  EXPECT_TRUE((*follower.Next(kAll))->events[0].is_private);
}

TEST_F(PrefixEvents, WhoeverReadsTooSlowlyHasToStartOver) {
  PrefixFollower follower(cache_);
  Picture picture;
  EXPECT_TRUE(picture.CatchUp(follower).ok());
  for (uint32_t id = 0; id < 6; ++id) Compute({id});  // 6 stored, 2 removed
  EXPECT_FALSE(follower.IsBehind());
  Compute({6});
  EXPECT_TRUE(follower.IsBehind());
  const absl::Status status = picture.CatchUp(follower);
  EXPECT_EQ(status.code(), absl::StatusCode::kAborted);
  EXPECT_THAT(std::string(status.message()), ::testing::HasSubstr("behind number 0 are gone"));
  PrefixFollower again(cache_);
  Picture fresh;
  EXPECT_TRUE(fresh.CatchUp(again).ok());
  EXPECT_THAT(fresh.first_tokens(), ElementsAre(3, 4, 5, 6));
}

TEST_F(PrefixEvents, WhoeverReadsTheSnapshotTooSlowlyHasToStartOver) {
  Compute({100});
  Compute({101});
  PrefixFollower follower(cache_);
  EXPECT_TRUE(follower.Next(1).ok());
  for (uint32_t id = 0; id < 7; ++id) Compute({id});
  EXPECT_TRUE(follower.IsBehind());
  EXPECT_EQ(follower.Next(1).status().code(), absl::StatusCode::kAborted);
}

TEST_F(PrefixEvents, ACacheWithoutEventsKeepsNone) {
  PrefixCache cache(4, PrefixReuseRule::kLooser);
  EXPECT_FALSE(cache.keeps_events());
  EXPECT_TRUE(cache_.keeps_events());
}

// Followers that come at any time and read at any pace have the same picture in the end.
TEST(PrefixFollower, HoldsWhatTheCacheHoldsAfterRandomChanges) {
  std::mt19937 random(5);
  PrefixCache cache(40, PrefixReuseRule::kLooser, Xxh3PrefixHash, 100'000);
  struct Reader {
    PrefixFollower follower;
    Picture picture;
  };
  std::vector<Reader> readers;
  for (int i = 0; i < 500; ++i) {
    std::vector<uint32_t> tokens;
    for (uint32_t block = 0; block < 1 + random() % 6; ++block) {
      tokens.insert(tokens.end(), kPrefixBlockTokens, static_cast<uint32_t>(random() % 3));
    }
    const auto policy = random() % 4 == 0 ? AttentionPolicy::kShare : AttentionPolicy::kDense;
    cache.Take({"domain", tokens, With(policy)}).Publish();
    if (i % 50 == 0) readers.push_back({PrefixFollower(cache), {}});
    for (Reader& reader : readers) {
      if (random() % 3 != 0) continue;
      const auto batch = *reader.follower.Next(1 + random() % 8);
      if (batch.has_value()) reader.picture.Apply(*batch);
    }
  }
  Reader last = {PrefixFollower(cache), {}};
  ASSERT_TRUE(last.picture.CatchUp(last.follower).ok());
  EXPECT_EQ(static_cast<int64_t>(last.picture.blocks().size()), cache.counts().used_slots);
  for (Reader& reader : readers) {
    ASSERT_TRUE(reader.picture.CatchUp(reader.follower, 7).ok());
    ASSERT_EQ(reader.picture.blocks().size(), last.picture.blocks().size());
    for (const auto& [key, event] : last.picture.blocks()) {
      ASSERT_TRUE(reader.picture.blocks().contains(key));
      EXPECT_EQ(reader.picture.blocks().at(key).policy, event.policy);
      EXPECT_EQ(reader.picture.blocks().at(key).parent, event.parent);
      EXPECT_EQ(reader.picture.blocks().at(key).tokens, event.tokens);
    }
    EXPECT_EQ(reader.picture.last(), cache.last_event());
  }
}

}  // namespace
}  // namespace prefilld::model
