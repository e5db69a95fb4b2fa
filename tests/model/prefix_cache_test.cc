// Tests the index of the prefix cache over a memory that a test can read.
#include "model/prefill/prefix_cache.h"

#include <algorithm>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/prefix_key.h"
#include "model/prefill/prefix_reuse.h"

namespace prefilld::model {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr int64_t kBlock = kPrefixBlockTokens;

AttentionOptions With(AttentionPolicy policy, float gamma = 0.9f) {
  AttentionOptions options;
  options.policy = policy;
  options.gamma = gamma;
  return options;
}
const AttentionOptions kDense = With(AttentionPolicy::kDense);
const AttentionOptions kShare = With(AttentionPolicy::kShare);

// A prompt whose block i consists of ids[i], and `rest` more tokens.
std::vector<uint32_t> Prompt(const std::vector<uint32_t>& ids, int64_t rest = 1) {
  std::vector<uint32_t> tokens;
  for (const uint32_t id : ids) tokens.insert(tokens.end(), kBlock, id);
  tokens.insert(tokens.end(), static_cast<size_t>(rest), 7);
  return tokens;
}

PrefixQuery Ask(const std::vector<uint32_t>& tokens, const AttentionOptions& attention = kDense,
                const std::string& salt = "") {
  return {PrefixDomain("model", 0, salt), tokens, attention};
}

void Compute(PrefixCache& cache, const std::vector<uint32_t>& tokens,
             const AttentionOptions& attention = kDense, const std::string& salt = "") {
  cache.Take(Ask(tokens, attention, salt)).Publish();
}

int64_t Found(PrefixCache& cache, const std::vector<uint32_t>& tokens,
              const AttentionOptions& attention = kDense, const std::string& salt = "") {
  const PrefixQuery query = Ask(tokens, attention, salt);
  const int64_t usable = cache.CountUsable(query);
  EXPECT_EQ(cache.Take(query).found_tokens(), usable);
  return usable;
}

std::string Hex(const PrefixKey& key) {
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(key.data()), key.size()));
}

// tests/evaluation/python_client_test.py expects the same of the Python client.
TEST(PrefixKeys, AreWhatTheDocumentationSays) {
  const std::string domain = PrefixDomain("0123456789abcdef0123456789abcdef", 0, "tenant a");
  EXPECT_EQ(domain, "prefilld-prefix 1\n0123456789abcdef0123456789abcdef\n0\ntenant a");
  std::vector<uint32_t> tokens(2 * kBlock);
  for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<uint32_t>(i * i * 1000);
  const auto span = absl::MakeConstSpan(tokens);
  const PrefixKey root = Xxh3PrefixHash(domain.data(), domain.size());
  const PrefixKey first = PrefixBlockKey(root, span.first(kBlock));
  EXPECT_EQ(Hex(root), "0c46adbeeda9440e2d5443085bc9547b");
  EXPECT_EQ(Hex(first), "0f17f8fb269de7f310f1567d93bc19a5");
  EXPECT_EQ(Hex(PrefixBlockKey(first, span.subspan(kBlock))), "f620efe8c9a80cfbc67c9d24a2b2fb55");
}

TEST(PrefixCache, FindsWhatWasPublishedAndNothingElse) {
  PrefixCache cache(8, PrefixReuseRule::kLooser);
  EXPECT_EQ(Found(cache, Prompt({1, 2, 3})), 0);
  Compute(cache, Prompt({1, 2, 3}));
  EXPECT_EQ(Found(cache, Prompt({1, 2, 3})), 3 * kBlock);
  EXPECT_EQ(Found(cache, Prompt({1, 2, 4})), 2 * kBlock);
  EXPECT_EQ(Found(cache, Prompt({1})), kBlock);
  EXPECT_EQ(Found(cache, Prompt({2, 3})), 0) << "the same tokens after another prefix";
  EXPECT_EQ(Found(cache, Prompt({}, 5)), 0);
  EXPECT_EQ(Found(cache, Prompt({}, 0)), 0);
  EXPECT_EQ(Found(cache, Prompt({1, 2, 3}), kDense, "a tenant"), 0);
}

TEST(PrefixCache, LeavesATokenToCompute) {
  PrefixCache cache(8, PrefixReuseRule::kLooser);
  Compute(cache, Prompt({1, 2}, 0));
  EXPECT_EQ(Found(cache, Prompt({1, 2}, 0)), kBlock);
  EXPECT_EQ(Found(cache, Prompt({1, 2}, 1)), 2 * kBlock);
  const PrefixLease lease = cache.Take(Ask(Prompt({1, 2}, 0)));
  EXPECT_THAT(lease.added(), IsEmpty()) << "the last block is there already";
}

TEST(PrefixCache, ForgetsALeaseThatIsNotPublished) {
  PrefixCache cache(3, PrefixReuseRule::kLooser);
  {
    const PrefixLease lease = cache.Take(Ask(Prompt({1, 2})));
    EXPECT_THAT(lease.added(), ElementsAre(0, 1));
    EXPECT_EQ(cache.counts().used_slots, 2);
  }
  EXPECT_EQ(Found(cache, Prompt({1, 2})), 0);
  EXPECT_EQ(cache.counts().used_slots, 0);
}

TEST(PrefixCache, EvictsTheLeafThatWasUsedLeastRecently) {
  PrefixCache cache(4, PrefixReuseRule::kLooser);
  Compute(cache, Prompt({1, 2}));
  Compute(cache, Prompt({3, 4}));
  EXPECT_EQ(Found(cache, Prompt({1, 2})), 2 * kBlock);  // a use
  Compute(cache, Prompt({5}));
  EXPECT_EQ(cache.CountUsable(Ask(Prompt({3, 4}))), kBlock) << "its end went first";
  EXPECT_EQ(cache.CountUsable(Ask(Prompt({1, 2}))), 2 * kBlock);
  EXPECT_EQ(cache.counts().evicted_blocks, 1);
}

TEST(PrefixCache, EvictsNothingThatALeaseHolds) {
  PrefixCache cache(3, PrefixReuseRule::kLooser);
  Compute(cache, Prompt({1, 2}));
  {
    const PrefixLease reads = cache.Take(Ask(Prompt({1, 2})));
    PrefixLease writes = cache.Take(Ask(Prompt({3, 4, 5})));
    EXPECT_THAT(writes.added(), ElementsAre(2));
    EXPECT_EQ(cache.counts().skipped_blocks, 2);
    writes.Publish();
    EXPECT_EQ(Found(cache, Prompt({3, 4, 5})), kBlock);
  }
  EXPECT_EQ(Found(cache, Prompt({1, 2})), 2 * kBlock);
}

TEST(PrefixCache, KeepsOneCopyOfWhatTwoComputed) {
  PrefixCache cache(8, PrefixReuseRule::kLooser);
  {
    PrefixLease one = cache.Take(Ask(Prompt({1, 2})));
    PrefixLease other = cache.Take(Ask(Prompt({1, 2, 3})));
    EXPECT_EQ(cache.counts().used_slots, 5);
    one.Publish();
    other.Publish();
  }
  EXPECT_EQ(cache.counts().used_slots, 3);
  EXPECT_EQ(cache.counts().stored_blocks, 3);
  EXPECT_EQ(Found(cache, Prompt({1, 2, 3})), 3 * kBlock);
}

TEST(PrefixCache, DenseServesAllAndReplacesWhatIsSparse) {
  PrefixCache cache(8, PrefixReuseRule::kLooser);
  Compute(cache, Prompt({1, 2}), kShare);
  EXPECT_EQ(Found(cache, Prompt({1, 2}), kDense), 0);
  EXPECT_EQ(Found(cache, Prompt({1, 2}), kShare), 2 * kBlock);
  Compute(cache, Prompt({1}), kDense);
  EXPECT_EQ(Found(cache, Prompt({1, 2}), kDense), kBlock) << "block 1 is still sparse";
  EXPECT_EQ(Found(cache, Prompt({1, 2}), kShare), 2 * kBlock);
  EXPECT_EQ(cache.counts().used_slots, 2);
}

TEST(PrefixCache, DoesNotReplaceWhatIsBeingRead) {
  PrefixCache cache(8, PrefixReuseRule::kLooser);
  Compute(cache, Prompt({1}), kShare);
  const PrefixLease reads = cache.Take(Ask(Prompt({1}), kShare));
  const std::vector<int> slots(reads.found().begin(), reads.found().end());
  Compute(cache, Prompt({1}), kDense);
  EXPECT_EQ(Found(cache, Prompt({1}), kDense), 0);
  EXPECT_EQ(cache.Take(Ask(Prompt({1}), kShare)).found()[0], slots[0]);
}

TEST(PrefixReuse, LooserMeansThatNoLessMassWasKept) {
  const auto may = [](const AttentionOptions& computed, const AttentionOptions& wanted) {
    return MayReuse(PrefixReuseRule::kLooser, computed, wanted);
  };
  const AttentionOptions strict = With(AttentionPolicy::kShare, 0.95f);
  EXPECT_TRUE(may(kDense, kShare));
  EXPECT_FALSE(may(kShare, kDense));
  EXPECT_TRUE(may(kShare, kShare));
  EXPECT_TRUE(may(strict, kShare));
  EXPECT_FALSE(may(kShare, strict));
  EXPECT_FALSE(may(strict, With(AttentionPolicy::kVerticalSlash, 0.5f)));
  AttentionOptions other = kShare;
  other.tau = 0.1f;
  EXPECT_FALSE(may(kShare, other));
  EXPECT_FALSE(may(other, kShare));
  other = kShare;
  other.min_budget_tokens *= 2;
  EXPECT_FALSE(may(kShare, other));
  EXPECT_TRUE(may(other, kShare));
  other = kShare;
  other.crossover_tokens = 1;
  EXPECT_TRUE(may(kShare, other));
}

TEST(PrefixReuse, EqualMeansEqual) {
  const auto may = [](const AttentionOptions& computed, const AttentionOptions& wanted) {
    return MayReuse(PrefixReuseRule::kEqual, computed, wanted);
  };
  EXPECT_TRUE(may(kDense, With(AttentionPolicy::kDense, 0.5f)));
  EXPECT_FALSE(may(kDense, kShare));
  EXPECT_TRUE(may(kShare, kShare));
  EXPECT_FALSE(may(With(AttentionPolicy::kShare, 0.95f), kShare));
}

TEST(PrefixReuse, RulesHaveNames) {
  EXPECT_EQ(ParsePrefixReuseRule("looser"), PrefixReuseRule::kLooser);
  EXPECT_EQ(ParsePrefixReuseRule("equal"), PrefixReuseRule::kEqual);
  EXPECT_EQ(ParsePrefixReuseRule("all"), std::nullopt);
}

// Four bits of the real hash: most keys collide.
PrefixKey WeakHash(const void* data, size_t bytes) {
  PrefixKey key = {};
  key[0] = Xxh3PrefixHash(data, bytes)[0] & 15;
  return key;
}

TEST(PrefixCache, ComparesTokensWhereKeysCollide) {
  const auto one_key = [](const void*, size_t) { return PrefixKey{}; };
  PrefixCache cache(8, PrefixReuseRule::kLooser, one_key);
  Compute(cache, Prompt({1}));
  EXPECT_EQ(Found(cache, Prompt({1})), kBlock);
  EXPECT_EQ(Found(cache, Prompt({2})), 0);
  EXPECT_EQ(Found(cache, Prompt({1}), kDense, "a tenant"), 0);
  EXPECT_EQ(Found(cache, Prompt({1, 1})), kBlock) << "the same tokens, but not the same prefix";
  Compute(cache, Prompt({2}));
  EXPECT_EQ(Found(cache, Prompt({1})), kBlock);
  EXPECT_EQ(cache.counts().used_slots, 1);
}

// The content of a slot: everything that its block's KV depends on.
struct Content {
  std::string domain;
  std::vector<uint32_t> prefix;
  AttentionOptions attention;
};

// Takes, fills, publishes and drops leases at random and checks after every operation that no slot
// has two users and that every block found holds what the prompt needs.
class RandomUse {
 public:
  RandomUse(int64_t num_slots, PrefixHash hash, uint64_t seed)
      : cache_(num_slots, PrefixReuseRule::kLooser, hash), memory_(num_slots), random_(seed) {}

  void Run(int operations) {
    for (int i = 0; i < operations && !::testing::Test::HasFailure(); ++i) {
      if (open_.size() < 4 && random_() % 2 == 0) {
        TakeOne();
      } else if (!open_.empty()) {
        EndOne();
      }
      CheckSlots();
    }
  }

  const PrefixCache& cache() const { return cache_; }

 private:
  struct Open {
    std::vector<uint32_t> tokens;
    PrefixQuery query;
    PrefixLease lease;
  };

  void TakeOne() {
    std::vector<uint32_t> ids(random_() % 7);
    for (uint32_t& id : ids) id = static_cast<uint32_t>(random_() % 2);
    auto open = std::make_unique<Open>();
    open->tokens = Prompt(ids, static_cast<int64_t>(random_() % 2));
    const AttentionOptions choices[] = {kDense, kShare, With(AttentionPolicy::kShare, 0.95f)};
    open->query = Ask(open->tokens, choices[random_() % 3], random_() % 2 == 0 ? "" : "a tenant");
    open->lease = cache_.Take(open->query);
    EXPECT_LT(open->lease.found_tokens(), std::max<int64_t>(1, open->tokens.size()));
    CheckFound(*open);
    for (size_t i = 0; i < open->lease.added().size(); ++i) {
      const auto end = (open->lease.first_new_block() + static_cast<int64_t>(i) + 1) * kBlock;
      memory_[open->lease.added()[i]] = {open->query.domain,
                                         {open->tokens.begin(), open->tokens.begin() + end},
                                         open->query.attention};
    }
    open_.push_back(std::move(open));
  }

  void EndOne() {
    const size_t i = random_() % open_.size();
    CheckFound(*open_[i]);
    if (random_() % 3 != 0) open_[i]->lease.Publish();
    open_.erase(open_.begin() + static_cast<int64_t>(i));
  }

  void CheckFound(const Open& open) {
    for (size_t i = 0; i < open.lease.found().size(); ++i) {
      const Content& content = memory_[open.lease.found()[i]];
      const auto end = (static_cast<int64_t>(i) + 1) * kBlock;
      EXPECT_EQ(content.domain, open.query.domain);
      EXPECT_TRUE(content.prefix ==
                  std::vector<uint32_t>(open.tokens.begin(), open.tokens.begin() + end));
      EXPECT_TRUE(MayReuse(PrefixReuseRule::kLooser, content.attention, open.query.attention));
    }
  }

  void CheckSlots() {
    std::set<int> read, written;
    for (const auto& open : open_) {
      read.insert(open->lease.found().begin(), open->lease.found().end());
    }
    for (const auto& open : open_) {
      for (const int slot : open->lease.added()) {
        EXPECT_TRUE(written.insert(slot).second) << "two write slot " << slot;
        EXPECT_FALSE(read.contains(slot)) << "slot " << slot << " is read and written";
        EXPECT_LT(slot, static_cast<int>(memory_.size()));
      }
    }
    const PrefixCacheCounts counts = cache_.counts();
    EXPECT_LE(counts.used_slots, counts.num_slots);
    EXPECT_GE(counts.used_slots, static_cast<int64_t>(read.size() + written.size()));
  }

  PrefixCache cache_;
  std::vector<Content> memory_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<Open>> open_;
};

TEST(PrefixCache, TenThousandRandomOperations) {
  for (const int64_t num_slots : {1, 5, 24}) {
    SCOPED_TRACE(num_slots);
    RandomUse use(num_slots, Xxh3PrefixHash, static_cast<uint64_t>(num_slots));
    use.Run(10000);
    EXPECT_GT(use.cache().counts().hit_tokens, 0);
    EXPECT_GT(use.cache().counts().evicted_blocks, 0);
  }
}

TEST(PrefixCache, TenThousandRandomOperationsWithCollisions) {
  RandomUse use(24, WeakHash, 3);
  use.Run(10000);
  EXPECT_GT(use.cache().counts().hit_tokens, 0);
}

}  // namespace
}  // namespace prefilld::model
