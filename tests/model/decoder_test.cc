#include "model/decode/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <memory>
#include <numeric>
#include <random>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "model/decode/sampling.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::model {
namespace {

using kernels::KvOrder;
using ::testing::HasSubstr;

std::unique_ptr<Decoder> CreateDecoder(const std::string& dir, int block_tokens, KvOrder order,
                                       int64_t pool_tokens) {
  DecoderOptions options;
  options.checkpoint_dir = dir;
  options.device = DeviceChoice::kCpu;
  options.cpu_threads = 2;
  options.block_tokens = block_tokens;
  options.order = order;
  options.pool_tokens = pool_tokens;
  auto decoder = Decoder::Create(options);
  EXPECT_TRUE(decoder.ok()) << decoder.status();
  return decoder.ok() ? *std::move(decoder) : nullptr;
}

uint32_t Greedy(const std::vector<float>& logits, int64_t position) {
  const auto token = Sample(logits, SamplingOptions(), position);
  EXPECT_TRUE(token.ok()) << token.status();
  return token.ok() ? token->token_id : 0;
}

// Makes a block table that has the pool's blocks out of order, some of them side by side.
std::vector<int32_t> ScrambledTable(const Decoder& decoder) {
  std::vector<int32_t> table(decoder.num_pool_blocks());
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.begin() + static_cast<std::ptrdiff_t>(table.size() / 2),
               std::mt19937(3));
  std::rotate(table.begin(), table.begin() + 2, table.end());
  return table;
}

using Pieces = std::vector<absl::Span<const uint8_t>>;

// Cuts bytes into pieces of random sizes, as a network does, some of them empty.
Pieces Cut(absl::Span<const uint8_t> bytes, std::mt19937& random) {
  Pieces pieces;
  while (!bytes.empty()) {
    const size_t size = std::min<size_t>(random() % 3000, bytes.size());
    pieces.push_back(bytes.subspan(0, size));
    bytes.remove_prefix(size);
  }
  return pieces;
}

// Hands a layer's KV from the engine to the decoder, with the heads in `shares` parts.
void HandOver(PrefillEngine& engine, PrefillSequence& sequence, Decoder& decoder, int layer,
              int64_t num_tokens, int block_tokens, KvOrder order, int shares,
              const std::vector<int32_t>& table) {
  KvSelection selection =
      WholeLayer(engine.info().config, num_tokens, block_tokens, order, decoder.kv_dtype());
  const int heads = selection.num_heads / shares;
  selection.num_heads = heads;
  std::mt19937 random(layer);
  const absl::Span<const int32_t> blocks(table.data(), selection.num_blocks);
  for (int share = 0; share < shares; ++share) {
    selection.first_head = share * heads;
    const auto packed = PackLayer(engine, sequence, layer, selection);
    for (bool is_value : {false, true}) {
      const auto tensor =
          absl::MakeConstSpan(packed).subspan(is_value ? packed.size() / 2 : 0, packed.size() / 2);
      ASSERT_TRUE(decoder
                      .StoreBlocks(layer, is_value, blocks, selection.first_head, heads,
                                   Cut(tensor, random))
                      .ok());
    }
  }
}

// Prefills by the engine, hands the KV over layer by layer, and returns `count` greedy tokens of
// the decoder.
std::vector<uint32_t> GenerateDisaggregated(PrefillEngine& engine, Decoder& decoder,
                                            const std::vector<uint32_t>& prompt, int block_tokens,
                                            KvOrder order, int shares, int count) {
  const int64_t num_tokens = static_cast<int64_t>(prompt.size());
  const std::vector<int32_t> table = ScrambledTable(decoder);
  auto sequence = engine.Start(prompt, DenseAttention());
  EXPECT_TRUE(sequence.ok()) << sequence.status();
  for (int layer = 0; layer < engine.info().config.num_layers; ++layer) {
    EXPECT_TRUE((*sequence)->RunLayer().ok());
    HandOver(engine, **sequence, decoder, layer, num_tokens, block_tokens, order, shares, table);
    (*sequence)->ReleaseKv(layer);
  }
  std::vector<uint32_t> generated = {
      Greedy((*sequence)->FinalLogits().value().front(), num_tokens)};
  while (static_cast<int>(generated.size()) < count) {
    const int64_t position = num_tokens + static_cast<int64_t>(generated.size()) - 1;
    const auto logits = decoder.Step(generated.back(), position, num_tokens, table);
    EXPECT_TRUE(logits.ok()) << logits.status();
    if (!logits.ok()) break;
    generated.push_back(Greedy(*logits, position + 1));
  }
  return generated;
}

// Returns the same tokens by prefilling prompt and answer anew for each of them.
std::vector<uint32_t> GenerateByPrefill(PrefillEngine& engine, std::vector<uint32_t> tokens,
                                        int count) {
  std::vector<uint32_t> generated;
  for (int i = 0; i < count; ++i) {
    const PromptRun run = RunPrompt(engine, tokens, DenseAttention());
    generated.push_back(Greedy(run.logits, static_cast<int64_t>(tokens.size())));
    tokens.push_back(generated.back());
  }
  return generated;
}

TEST(Decoder, ContinuesAPrefilledPromptLikeOneProcessInEveryLayout) {
  constexpr int kTokens = 12;
  const RandomCheckpoint checkpoint;
  const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 300));
  const auto prompt = RandomTokens(203, checkpoint.config().vocab_size);
  const auto expected = GenerateByPrefill(*engine, prompt, kTokens);
  for (int block_tokens : {16, 32, 64, 128}) {
    for (KvOrder order : {KvOrder::kNhd, KvOrder::kHnd}) {
      for (int shares : {1, 2}) {
        const auto decoder = CreateDecoder(checkpoint.dir(), block_tokens, order, 300);
        EXPECT_EQ(
            GenerateDisaggregated(*engine, *decoder, prompt, block_tokens, order, shares, kTokens),
            expected)
            << block_tokens << (order == KvOrder::kNhd ? " NHD " : " HND ") << shares;
      }
    }
  }
}

TEST(Decoder, PiecesOfAnySizesGoWhereTheWholeGoes) {
  constexpr int kBlocks = 8, kTokens = 32;
  const RandomCheckpoint checkpoint;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> values(-1.0f, 1.0f);
  for (const KvOrder order : {KvOrder::kNhd, KvOrder::kHnd}) {
    for (const int num_heads : {1, 2}) {
      const auto whole = CreateDecoder(checkpoint.dir(), kTokens, order, 2 * kBlocks * kTokens);
      const auto cut = CreateDecoder(checkpoint.dir(), kTokens, order, 2 * kBlocks * kTokens);
      const std::vector<int32_t> table = ScrambledTable(*whole);
      const auto blocks = absl::MakeConstSpan(table).subspan(0, kBlocks);
      for (int layer = 0; layer < whole->config().num_layers; ++layer) {
        for (const bool is_value : {false, true}) {
          for (int first_head = 0; first_head < 2; first_head += num_heads) {
            std::vector<float> data(kBlocks * kTokens * num_heads * whole->config().head_dim);
            for (float& value : data) value = values(random);
            const absl::Span<const uint8_t> bytes(reinterpret_cast<const uint8_t*>(data.data()),
                                                  data.size() * sizeof(float));
            ASSERT_TRUE(
                whole->StoreBlocks(layer, is_value, blocks, first_head, num_heads, {bytes}).ok());
            ASSERT_TRUE(
                cut->StoreBlocks(layer, is_value, blocks, first_head, num_heads, Cut(bytes, random))
                    .ok());
          }
        }
      }
      const int64_t last = kBlocks * kTokens - 1;
      EXPECT_EQ(whole->Step(1, last, last, table).value(), cut->Step(1, last, last, table).value());
    }
  }
}

TEST(Decoder, FamiliesContinueLikeOneProcess) {
  ModelConfig qwen3 = SmallRandomConfig();
  qwen3.family = Family::kQwen3;
  qwen3.qk_norm = true;
  qwen3.tied_embeddings = true;
  ModelConfig qwen2 = SmallRandomConfig();
  qwen2.family = Family::kQwen2;
  qwen2.qkv_bias = true;
  qwen2.head_dim = 128;
  for (const ModelConfig& config : {qwen3, qwen2}) {
    const RandomCheckpoint checkpoint(config);
    const auto engine = NewEngine(CpuEngineOptions(checkpoint.dir(), 300));
    const auto decoder = CreateDecoder(checkpoint.dir(), 16, KvOrder::kNhd, 300);
    const auto prompt = RandomTokens(130, config.vocab_size);
    EXPECT_EQ(GenerateDisaggregated(*engine, *decoder, prompt, 16, KvOrder::kNhd, 1, 8),
              GenerateByPrefill(*engine, prompt, 8));
  }
}

TEST(Decoder, TheEmbeddedModelContinuesLikeOneProcess) {
  const std::string dir = "model/tiny";
  if (!std::filesystem::exists(dir + "/model.safetensors")) {
    GTEST_SKIP() << "this checkout has no embedded model";
  }
  const std::string text = "int main(int argc, char** argv) {\n  if (argc < 2) {\n    return ";
  const std::vector<uint32_t> prompt(text.begin(), text.end());
  const auto engine = NewEngine(CpuEngineOptions(dir, 200));
  const auto decoder = CreateDecoder(dir, 16, KvOrder::kNhd, 200);
  EXPECT_EQ(GenerateDisaggregated(*engine, *decoder, prompt, 16, KvOrder::kNhd, 1, 16),
            GenerateByPrefill(*engine, prompt, 16));
}

TEST(Decoder, SharesItsFingerprintWithTheEngine) {
  const RandomCheckpoint checkpoint;
  const RandomCheckpoint other(SmallRandomConfig(), /*seed=*/2);
  const auto decoder = CreateDecoder(checkpoint.dir(), 16, KvOrder::kNhd, 64);
  EXPECT_EQ(decoder->fingerprint(),
            NewEngine(CpuEngineOptions(checkpoint.dir(), 64))->info().fingerprint);
  EXPECT_NE(decoder->fingerprint(),
            NewEngine(CpuEngineOptions(other.dir(), 64))->info().fingerprint);
}

TEST(Decoder, PoolHoldsTheTokensAskedFor) {
  const RandomCheckpoint checkpoint;
  const auto decoder = CreateDecoder(checkpoint.dir(), 32, KvOrder::kHnd, 100);
  EXPECT_EQ(decoder->num_pool_blocks(), 4);
  EXPECT_EQ(decoder->block_bytes(), 32u * 2 * 64 * sizeof(float));
}

TEST(Decoder, RefusesWhatLiesOutsideModelOrPool) {
  const RandomCheckpoint checkpoint;
  const auto decoder = CreateDecoder(checkpoint.dir(), 16, KvOrder::kNhd, 64);
  const std::vector<uint8_t> bytes(decoder->block_bytes());
  const absl::Span<const uint8_t> block = bytes;
  EXPECT_TRUE(decoder->StoreBlocks(0, false, {0}, 0, 2, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(4, false, {0}, 0, 2, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(-1, false, {0}, 0, 2, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(0, false, {4}, 0, 2, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(0, false, {-1}, 0, 2, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(0, false, {0}, 1, 2, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(0, false, {0}, 0, 0, {block}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(0, false, {0}, 0, 2, {block.subspan(1)}).ok());
  EXPECT_FALSE(decoder->StoreBlocks(0, false, {0}, 0, 2, {block, block.subspan(0, 1)}).ok());
  EXPECT_FALSE(decoder->Step(320, 0, 1, {0}).ok());
  EXPECT_FALSE(decoder->Step(1, 16, 1, {0}).ok());
  EXPECT_FALSE(decoder->Step(1, -1, 1, {0}).ok());
  EXPECT_FALSE(decoder->Step(1, 0, 1, {9}).ok());
  EXPECT_TRUE(decoder->Step(1, 0, 1, {3}).ok());
}

TEST(Decoder, RefusesOptionsItCannotHonour) {
  const RandomCheckpoint checkpoint;
  DecoderOptions options;
  options.checkpoint_dir = checkpoint.dir();
  options.device = DeviceChoice::kCpu;
  EXPECT_THAT(Decoder::Create(options).status().message(), HasSubstr("pool_tokens 0"));
  options.pool_tokens = 64;
  options.order = KvOrder::kHn2d;
  EXPECT_THAT(Decoder::Create(options).status().message(), HasSubstr("K and V in one block"));
  options.order = KvOrder::kNhd;
  options.block_tokens = 24;
  EXPECT_THAT(Decoder::Create(options).status().message(), HasSubstr("block_tokens 24"));
}

}  // namespace
}  // namespace prefilld::model
