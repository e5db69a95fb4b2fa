// Tests that a prompt whose beginning comes from the prefix cache gives what it gives when all of
// it is computed.
//
//   cached_prompts_test [--device=cpu|cuda]
#include <algorithm>
#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/prefill/prefill_engine.h"
#include "tests/model/device_flag.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

using ::testing::HasSubstr;

using Tokens = std::vector<uint32_t>;

constexpr int64_t kEnough = int64_t{64} << 20;

// The products have other numbers of rows, and may add in another order. The tolerances are those
// of prompt_batch_test, for the same reason.
double RelativeTolerance() { return DeviceFlag() == DeviceChoice::kCpu ? 1e-5 : 2e-2; }

double RelativeError(const std::vector<float>& actual, const std::vector<float>& expected) {
  if (actual.size() != expected.size()) return INFINITY;
  double difference = 0, norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    difference += std::pow(double{actual[i]} - expected[i], 2);
    norm += std::pow(double{expected[i]}, 2);
  }
  return std::sqrt(difference / norm);
}

int64_t Likeliest(const std::vector<float>& logits) {
  return std::max_element(logits.begin(), logits.end()) - logits.begin();
}

// Expects equal results but for rounding, and the same first token unless two are as good as equal.
void ExpectClose(const PromptRun& actual, const PromptRun& expected) {
  ASSERT_EQ(actual.kv.size(), expected.kv.size());
  for (size_t layer = 0; layer < actual.kv.size(); ++layer) {
    EXPECT_LT(RelativeError(actual.kv[layer], expected.kv[layer]), RelativeTolerance()) << layer;
  }
  EXPECT_LT(RelativeError(actual.logits, expected.logits), RelativeTolerance());
  if (DeviceFlag() == DeviceChoice::kCpu) {
    EXPECT_EQ(Likeliest(actual.logits), Likeliest(expected.logits));
  }
}

// Returns the KV of the first tokens of a layer, which PromptRun has by head.
std::vector<float> Beginning(const std::vector<float>& kv, const ModelConfig& config,
                             int64_t num_tokens, int64_t count) {
  std::vector<float> beginning;
  const int64_t padded = kernels::CeilDiv(num_tokens, 128) * 128;
  // The blocks are [2][blocks][heads][128][head_dim].
  const int64_t block = int64_t{config.num_kv_heads} * 128 * config.head_dim;
  for (const int64_t tensor : {0, 1}) {
    const auto first = kv.begin() + tensor * (padded / 128) * block;
    beginning.insert(beginning.end(), first, first + count / 128 * block);
  }
  return beginning;
}

AttentionOptions Sparse(AttentionPolicy policy) {
  AttentionOptions options;
  options.policy = policy;
  options.tau = 1.0f;
  options.coverage = 1.0f;
  options.gamma = policy == AttentionPolicy::kShare ? 0.5f : 0.1f;
  options.min_budget_tokens = 0;
  return options;
}

class CachedPrompts : public ::testing::Test {
 protected:
  CachedPrompts() {
    checkpoint_.WriteFile("head_clusters.json", ClusterFile(checkpoint_.config(), /*alone=*/false));
  }

  EngineOptions Options(int64_t cache_bytes, int block_tokens = 128) const {
    EngineOptions options = CpuEngineOptions(checkpoint_.dir(), 2000);
    options.device = DeviceFlag();
    options.block_tokens = block_tokens;
    options.long_prompts = 3;
    options.prefix_cache_bytes = cache_bytes;
    return options;
  }

  Tokens Random(int64_t count, uint64_t seed) const {
    return RandomTokens(count, checkpoint_.config().vocab_size, seed);
  }
  // Returns `count` tokens that begin with the first `shared` of `prompt`.
  Tokens Continue(const Tokens& prompt, int64_t shared, int64_t count, uint64_t seed = 99) const {
    Tokens tokens = Random(count, seed);
    std::copy(prompt.begin(), prompt.begin() + shared, tokens.begin());
    return tokens;
  }

  RandomCheckpoint checkpoint_;
};

TEST_F(CachedPrompts, DenseOnesEqualThoseThatAreComputed) {
  for (const int block_tokens : {64, 128}) {
    const auto cold = NewEngine(Options(0, block_tokens));
    for (const int64_t shared : {128, 256, 1280}) {
      const auto engine = NewEngine(Options(kEnough, block_tokens));
      const Tokens first = Random(1300, 1);
      const PromptRun first_cold = RunPrompt(*cold, first, DenseAttention());
      EXPECT_EQ(RunPrompt(*engine, first, DenseAttention()).cached_tokens, 0);
      for (const int64_t length : {1281, 1408}) {
        SCOPED_TRACE(testing::Message() << shared << " of " << length);
        const Tokens second = Continue(first, shared, length, /*seed=*/length);
        const PromptRun cached = RunPrompt(*engine, second, DenseAttention());
        EXPECT_EQ(cached.cached_tokens, shared);
        EXPECT_EQ(cached.reports[0].num_queries, length - shared);
        EXPECT_EQ(cached.reports[0].dense_heads, 4);
        EXPECT_EQ(cached.reports.back().num_queries, 1);
        ExpectClose(cached, RunPrompt(*cold, second, DenseAttention()));
        // Cached KV is that of the first prompt, bit for bit.
        for (size_t layer = 0; layer < cached.kv.size(); ++layer) {
          EXPECT_TRUE(Beginning(cached.kv[layer], checkpoint_.config(), length, shared) ==
                      Beginning(first_cold.kv[layer], checkpoint_.config(), 1300, shared))
              << layer;
        }
      }
    }
  }
}

TEST_F(CachedPrompts, AllOfThePromptButItsEnd) {
  const auto engine = NewEngine(Options(kEnough));
  const auto cold = NewEngine(Options(0));
  for (const int64_t length : {129, 256, 1000, 1024}) {
    const Tokens prompt = Random(length, 5);
    RunPrompt(*engine, prompt, DenseAttention());
    const PromptRun again = RunPrompt(*engine, prompt, DenseAttention());
    EXPECT_EQ(again.cached_tokens, (length - 1) / 128 * 128) << length;
    ExpectClose(again, RunPrompt(*cold, prompt, DenseAttention()));
  }
}

TEST_F(CachedPrompts, AnswersDoNotChangeFromHitToHit) {
  const auto engine = NewEngine(Options(kEnough));
  const Tokens prompt = Random(1500, 5);
  RunPrompt(*engine, prompt, DenseAttention());
  const PromptRun once = RunPrompt(*engine, prompt, DenseAttention());
  const PromptRun twice = RunPrompt(*engine, prompt, DenseAttention());
  EXPECT_TRUE(once.kv == twice.kv);
  EXPECT_TRUE(once.logits == twice.logits);
}

// Packs blocks of a layer out of the prefix cache.
std::vector<uint8_t> PackCached(PrefillEngine& engine, PrefillSequence& sequence, int layer,
                                const KvSelection& selection, const ModelConfig& config) {
  const int64_t bytes = 2 * selection.num_blocks * selection.block_tokens * selection.num_heads *
                        config.head_dim * static_cast<int64_t>(kernels::SizeOf(selection.dtype));
  const auto buffer = engine.AllocateStaging(static_cast<size_t>(bytes));
  EXPECT_TRUE(buffer.ok()) << buffer.status();
  EXPECT_TRUE(sequence.PackCachedKv(layer, selection, buffer->data()).ok());
  const auto* begin = static_cast<const uint8_t*>(buffer->data());
  return {begin, begin + bytes};
}

// The KV of every layer is there before the first one is computed, in every form that is sent.
TEST_F(CachedPrompts, GiveTheirKvOutOfHostMemoryWithTheSameBytes) {
  const ModelConfig& config = checkpoint_.config();
  const auto engine = NewEngine(Options(kEnough));
  const Tokens prompt = Random(1000, 1);
  RunPrompt(*engine, Continue(prompt, 300, 700), DenseAttention());
  RunPrompt(*engine, prompt, DenseAttention());  // its blocks do not lie in one row
  auto sequence = engine->Start(prompt, DenseAttention());
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  ASSERT_EQ((*sequence)->cached_tokens(), 896);
  struct Form {
    KvSelection selection;
    std::vector<std::vector<uint8_t>> of_layers;
  };
  std::vector<Form> forms;
  for (const auto order : {kernels::KvOrder::kNhd, kernels::KvOrder::kHnd, kernels::KvOrder::kNh2d,
                           kernels::KvOrder::kHn2d}) {
    for (const auto dtype : {kernels::DType::kFp32, kernels::DType::kBf16, kernels::DType::kFp16}) {
      for (const int block_tokens : {16, 128}) {
        Form& form = forms.emplace_back();
        form.selection = WholeLayer(config, 896, block_tokens, order, dtype);
        form.selection.first_block = 1;
        form.selection.num_blocks -= 1;
        form.selection.first_head = config.num_kv_heads - 1;
        form.selection.num_heads = 1;
        for (int layer = 0; layer < config.num_layers; ++layer) {
          form.of_layers.push_back(PackCached(*engine, **sequence, layer, form.selection, config));
        }
      }
    }
  }
  for (int layer = 0; layer < config.num_layers; ++layer) {
    ASSERT_TRUE((*sequence)->RunLayer().ok());
    for (const Form& form : forms) {
      EXPECT_TRUE(PackLayer(*engine, **sequence, layer, form.selection) ==
                  form.of_layers[static_cast<size_t>(layer)])
          << "layer " << layer << ", order " << static_cast<int>(form.selection.order) << ", "
          << kernels::Name(form.selection.dtype);
    }
    (*sequence)->ReleaseKv(layer);
  }
  // It stays there until the sequence ends.
  ASSERT_TRUE((*sequence)->FinalLogits().ok());
  EXPECT_TRUE(PackCached(*engine, **sequence, 0, forms[0].selection, config) ==
              forms[0].of_layers[0]);
  KvSelection beyond = WholeLayer(config, 1000, 128, kernels::KvOrder::kNhd, kernels::DType::kBf16);
  const absl::Status status = (*sequence)->PackCachedKv(0, beyond, nullptr);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(status.message(), HasSubstr("896 cached tokens"));
}

// Blocks that are still to be packed are evicted for nobody.
TEST_F(CachedPrompts, HoldTheirBlocksUntilTheSequenceEnds) {
  const ModelConfig& config = checkpoint_.config();
  const int64_t block_bytes = 2 * config.num_layers * config.num_kv_heads * 128 * config.head_dim *
                              (DeviceFlag() == DeviceChoice::kCpu ? 4 : 2);
  const auto engine = NewEngine(Options(7 * block_bytes));
  const Tokens prompt = Random(900, 1);
  RunPrompt(*engine, prompt, DenseAttention());
  auto sequence = RunLayers(*engine, prompt, DenseAttention(), /*logprobs=*/false);
  ASSERT_EQ(sequence->cached_tokens(), 896);
  const KvSelection all =
      WholeLayer(config, 896, 128, kernels::KvOrder::kHnd, kernels::DType::kFp32);
  const auto before = PackCached(*engine, *sequence, 1, all, config);
  ASSERT_TRUE(sequence->FinalLogits().ok());
  RunPrompt(*engine, Random(900, 2), DenseAttention());
  EXPECT_EQ(engine->prefix_cache().counts.evicted_blocks, 0);
  EXPECT_TRUE(PackCached(*engine, *sequence, 1, all, config) == before);
  sequence.reset();
  RunPrompt(*engine, Random(900, 2), DenseAttention());
  EXPECT_EQ(engine->prefix_cache().counts.evicted_blocks, 7);
}

// At gamma 1 every block that has mass is kept, so sparse policies give what dense gives.
TEST_F(CachedPrompts, SparsePoliciesComputeQueriesBehindCachedKeys) {
  for (const int block_tokens : {64, 128}) {
    const auto cold = NewEngine(Options(0, block_tokens));
    for (const AttentionPolicy policy :
         {AttentionPolicy::kVerticalSlash, AttentionPolicy::kShare}) {
      SCOPED_TRACE(Name(policy));
      const auto engine = NewEngine(Options(kEnough, block_tokens));
      const Tokens first = Random(1100, 1);
      const Tokens second = Continue(first, 640, 1750);
      AttentionOptions exact = Sparse(policy);
      exact.gamma = 1.0f;
      exact.min_budget_tokens = 4096;
      RunPrompt(*engine, first, DenseAttention());
      const PromptRun cached = RunPrompt(*engine, second, exact);
      EXPECT_EQ(cached.cached_tokens, 640);
      EXPECT_EQ(cached.policy, policy);
      EXPECT_EQ(cached.reports[1].num_queries, 1750 - 640);
      EXPECT_EQ(cached.reports[1].dense_heads, 0);
      ExpectClose(cached, RunPrompt(*cold, second, DenseAttention()));

      const PromptRun sparse = RunPrompt(*engine, Continue(first, 640, 1750, 3), Sparse(policy));
      EXPECT_EQ(sparse.cached_tokens, 640);
      EXPECT_LT(sparse.reports[1].density, 1.0);
      EXPECT_GT(sparse.reports[1].density, 0.0);
    }
  }
}

TEST_F(CachedPrompts, AFewQueriesAreDenseUnderEveryPolicy) {
  const auto engine = NewEngine(Options(kEnough));
  const Tokens prompt = Random(1500, 1);
  const PromptRun sparse = RunPrompt(*engine, prompt, Sparse(AttentionPolicy::kShare));
  EXPECT_EQ(sparse.policy, AttentionPolicy::kShare);
  const PromptRun again = RunPrompt(*engine, prompt, Sparse(AttentionPolicy::kShare));
  EXPECT_EQ(again.cached_tokens, 1408);
  EXPECT_EQ(again.policy, AttentionPolicy::kDense);
  EXPECT_EQ(again.reports[0].dense_heads, 4);
  // Sparse KV is not used by those who asked for exact attention.
  EXPECT_EQ(RunPrompt(*engine, prompt, DenseAttention()).cached_tokens, 0);
  EXPECT_EQ(RunPrompt(*engine, prompt, Sparse(AttentionPolicy::kShare)).cached_tokens, 1408);
}

TEST_F(CachedPrompts, AreKeptApartBySaltAndMayBypassTheCache) {
  const auto engine = NewEngine(Options(kEnough));
  const Tokens prompt = Random(600, 1);
  const auto cached = [&](const PromptInput& input) {
    const int64_t expected = engine->CachedTokens(input);
    const int64_t tokens = RunPrompt(*engine, input).cached_tokens;
    EXPECT_EQ(tokens, expected);
    return tokens;
  };
  const PromptInput plain = {prompt, DenseAttention()};
  PromptInput bypass = plain, salt_a = plain, salt_b = plain, logprobs = plain;
  bypass.use_prefix_cache = false;
  salt_a.cache_salt = "a";
  salt_b.cache_salt = "b";
  logprobs.logprobs = true;
  EXPECT_EQ(cached(bypass), 0);
  EXPECT_EQ(cached(plain), 0) << "a bypass stores nothing";
  EXPECT_EQ(cached(bypass), 0);
  EXPECT_EQ(cached(plain), 512);
  EXPECT_EQ(cached(salt_a), 0);
  EXPECT_EQ(cached(salt_b), 0);
  EXPECT_EQ(cached(salt_a), 512);
  EXPECT_EQ(cached(logprobs), 0);
  EXPECT_EQ(cached(plain), 512);
}

TEST_F(CachedPrompts, WhoseRotationDependsOnTheLengthShareWithEqualLengthsAlone) {
  ModelConfig config = SmallRandomConfig();
  config.rope.kind = RopeKind::kDynamicNtk;
  config.rope.factor = 4.0;
  config.rope.original_max_positions = config.max_positions = 400;
  const RandomCheckpoint checkpoint(config);
  EngineOptions options = CpuEngineOptions(checkpoint.dir(), 1000);
  options.device = DeviceFlag();
  const auto cold = NewEngine(options);
  options.prefix_cache_bytes = kEnough;
  const auto engine = NewEngine(options);
  const Tokens first = RandomTokens(900, config.vocab_size, 1);
  const auto cached = [&](int64_t length) {
    Tokens prompt = first;
    prompt.resize(length);
    prompt.back() = 3;
    const PromptRun run = RunPrompt(*engine, prompt, DenseAttention());
    ExpectClose(run, RunPrompt(*cold, prompt, DenseAttention()));
    return run.cached_tokens;
  };
  EXPECT_EQ(cached(900), 0);
  EXPECT_EQ(cached(900), 896);
  EXPECT_EQ(cached(800), 0);
  EXPECT_EQ(cached(400), 0);
  EXPECT_EQ(cached(300), 256) << "the common rotation";
}

// Takes several prompts through the engine in turns, some of them ending midway, with a cache that
// has room for one of them. Every result must be that of a prompt computed cold.
TEST_F(CachedPrompts, InTurnsWithEvictionsAndCancellations) {
  const ModelConfig& config = checkpoint_.config();
  const int64_t block_bytes = 2 * config.num_layers * config.num_kv_heads * 128 * config.head_dim *
                              (DeviceFlag() == DeviceChoice::kCpu ? 4 : 2);
  const auto engine = NewEngine(Options(14 * block_bytes));
  const auto cold = NewEngine(Options(0));
  const Tokens base = Random(1500, 1);
  std::vector<Tokens> prompts;
  std::vector<PromptRun> expected;
  for (const int64_t shared : {0, 128, 640, 900, 1280, 1499}) {
    prompts.push_back(Continue(base, shared, 1300 + shared / 4, 50 + prompts.size()));
    expected.push_back(RunPrompt(*cold, prompts.back(), DenseAttention()));
  }
  struct Running {
    size_t prompt;
    std::unique_ptr<PrefillSequence> sequence;
    PromptRun run;
  };
  std::mt19937_64 random(4);
  std::vector<Running> running;
  int64_t cached = 0;
  int ended = 0;
  while (ended < 30 && !HasFailure()) {
    if (running.size() < 3 && random() % 3 == 0) {
      const size_t prompt = random() % prompts.size();
      auto sequence = engine->Start(prompts[prompt], DenseAttention());
      ASSERT_TRUE(sequence.ok()) << sequence.status();
      cached += (*sequence)->cached_tokens();
      running.push_back({prompt, *std::move(sequence), {}});
    }
    if (running.empty()) continue;
    const size_t i = random() % running.size();
    Running& turn = running[i];
    const auto layer = static_cast<int>(turn.run.kv.size());
    bool over = random() % 40 == 0;  // cancelled
    if (!over && layer < config.num_layers) {
      ASSERT_TRUE(turn.sequence->RunLayer().ok());
      const auto packed =
          PackLayer(*engine, *turn.sequence, layer,
                    WholeLayer(config, static_cast<int64_t>(prompts[turn.prompt].size()), 128,
                               kernels::KvOrder::kHnd, kernels::DType::kFp32));
      const auto* values = reinterpret_cast<const float*>(packed.data());
      turn.run.kv.emplace_back(values, values + packed.size() / sizeof(float));
      turn.sequence->ReleaseKv(layer);
    } else if (!over) {
      const auto logits = turn.sequence->FinalLogits();
      ASSERT_TRUE(logits.ok()) << logits.status();
      turn.run.logits = logits->front();
      ExpectClose(turn.run, expected[turn.prompt]);
      over = true;
    }
    if (over) {
      ++ended;
      running.erase(running.begin() + static_cast<int64_t>(i));
    }
    const PrefixCacheUse use = engine->prefix_cache();
    EXPECT_LE(use.counts.used_slots * use.block_bytes, 14 * block_bytes);
  }
  running.clear();
  const PrefixCacheCounts counts = engine->prefix_cache().counts;
  EXPECT_GT(cached, 0);
  EXPECT_EQ(counts.hit_tokens, cached);
  EXPECT_GT(counts.evicted_blocks, 0);
  EXPECT_GT(counts.skipped_blocks, 0);
  EXPECT_GT(counts.stored_blocks, 0);
}

// A consumer that is slow leaves no slot to load ahead into.
TEST_F(CachedPrompts, WithEverySlotHeldByTheConsumer) {
  const auto engine = NewEngine(Options(kEnough));
  const auto cold = NewEngine(Options(0));
  const Tokens prompt = Random(1200, 1);
  const PromptRun expected = RunPrompt(*cold, prompt, DenseAttention());
  RunPrompt(*engine, prompt, DenseAttention());
  auto sequence = engine->Start(prompt, DenseAttention());
  ASSERT_TRUE(sequence.ok());
  EXPECT_EQ((*sequence)->cached_tokens(), 1152);
  const ModelConfig& config = checkpoint_.config();
  const auto pack = [&](int layer) {
    const auto packed =
        PackLayer(*engine, **sequence, layer,
                  WholeLayer(config, 1200, 128, kernels::KvOrder::kHnd, kernels::DType::kFp32));
    const auto* values = reinterpret_cast<const float*>(packed.data());
    EXPECT_LT(RelativeError({values, values + packed.size() / sizeof(float)}, expected.kv[layer]),
              RelativeTolerance());
    (*sequence)->ReleaseKv(layer);
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    if (layer >= engine->kv_slots()) pack(layer - engine->kv_slots());
    const auto report = (*sequence)->RunLayer();
    ASSERT_TRUE(report.ok()) << report.status();
  }
  for (int layer = config.num_layers - engine->kv_slots(); layer < config.num_layers; ++layer) {
    pack(layer);
  }
  EXPECT_TRUE((*sequence)->FinalLogits().ok());
}

TEST_F(CachedPrompts, ACacheTooSmallForABlockIsRefused) {
  const absl::Status status = CreatePrefillEngine(Options(1000)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(status.message(), HasSubstr("prefix_cache_bytes 1000"));
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) { return prefilld::model::RunTestsOnDevice(argc, argv); }
