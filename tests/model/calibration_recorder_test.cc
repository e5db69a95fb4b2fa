#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "model/calibration/attention_recorder.h"
#include "model/checkpoint/safetensors.h"
#include "tests/model/random_checkpoint.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

constexpr int kBlockTokens = 64;
constexpr int64_t kTokens = 4 * kBlockTokens + 41;  // the last block is a part of one
constexpr int64_t kBlocks = 5;
constexpr float kTolerance = 1e-4f;  // fp32 against double

// Computes the exact block mass of all heads of a layer by the definition: [num_heads][kBlocks *
// kBlocks].
std::vector<std::vector<double>> ReferenceMass(const ModelConfig& config, const float* queries,
                                               const float* keys) {
  const int dim = config.head_dim;
  std::vector<std::vector<double>> mass(config.num_heads,
                                        std::vector<double>(kBlocks * kBlocks, 0.0));
  std::vector<double> weight(kTokens);
  for (int head = 0; head < config.num_heads; ++head) {
    const float* k =
        keys + int64_t{head / (config.num_heads / config.num_kv_heads)} * kTokens * dim;
    for (int64_t query = 0; query < kTokens; ++query) {
      const float* q = queries + (query * config.num_heads + head) * dim;
      for (int64_t key = 0; key <= query; ++key) {
        weight[key] = std::exp(std::inner_product(q, q + dim, k + key * dim, 0.0) / std::sqrt(dim));
      }
      const double sum = std::accumulate(weight.begin(), weight.begin() + query + 1, 0.0);
      const int64_t row = query / kBlockTokens;
      const int64_t rows = std::min<int64_t>(kBlockTokens, kTokens - row * kBlockTokens);
      for (int64_t key = 0; key <= query; ++key) {
        mass[head][row * kBlocks + key / kBlockTokens] += weight[key] / sum / rows;
      }
    }
  }
  return mass;
}

class AttentionRecorderTest : public testing::Test {
 protected:
  AttentionRecorderTest() {
    auto device = CreateDevice(DeviceChoice::kCpu, 2);
    EXPECT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
    auto weights = LoadWeights(checkpoint_.dir(), config(), *device_);
    EXPECT_TRUE(weights.ok()) << weights.status();
    weights_ = *std::move(weights);
    for (int64_t i = 0; i < kTokens; ++i) tokens_.push_back((i * i + 7 * i) % config().vocab_size);
    options_.max_tokens = kTokens + 100;  // a longer prompt's workspace changes nothing
    options_.block_tokens = kBlockTokens;
  }

  const ModelConfig& config() const { return checkpoint_.config(); }

  // Records tokens_ and opens the file.
  const TensorMap& Record() {
    const std::string path = folder_.path() + "/dump.safetensors";
    auto file = SafetensorsWriter::Create(
        path, RecordedTensors(config(), kTokens, options_),
        CalibrationMetadata(config(), weights_.fingerprint, kTokens, options_));
    EXPECT_TRUE(file.ok()) << file.status();
    auto recorder = AttentionRecorder::Create(device_.get(), &config(), &weights_, options_);
    EXPECT_TRUE(recorder.ok()) << recorder.status();
    int layers = 0;
    absl::Status status = (*recorder)->Record(tokens_, **file, [&](int) { ++layers; });
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_EQ(layers, config().num_layers);
    status = (*file)->Finish();
    EXPECT_TRUE(status.ok()) << status;

    std::ifstream stream(path, std::ios::binary);
    const std::string bytes((std::istreambuf_iterator<char>(stream)),
                            std::istreambuf_iterator<char>());
    EXPECT_EQ(static_cast<int64_t>(bytes.size()), (*file)->file_bytes());
    image_.resize(bytes.size() / sizeof(double) + 1);  // aligned
    std::memcpy(image_.data(), bytes.data(), bytes.size());
    auto tensors =
        ParseSafetensors({reinterpret_cast<const std::byte*>(image_.data()), bytes.size()});
    EXPECT_TRUE(tensors.ok()) << tensors.status();
    tensors_ = *std::move(tensors);
    return tensors_;
  }

  absl::Span<const float> Values(int layer, absl::string_view name) const {
    const Tensor& tensor = tensors_.at(absl::StrCat("layers.", layer, ".", name));
    return {reinterpret_cast<const float*>(tensor.data), tensor.bytes / sizeof(float)};
  }

  // Computes the reference of every layer, [num_layers], by a second layer step with exact
  // attention.
  std::vector<std::vector<std::vector<double>>> ReferenceOfAllLayers() {
    auto step = LayerStep::Create(device_.get(), &config(), &weights_, kTokens, 128);
    EXPECT_TRUE(step.ok());
    auto states = HiddenStates::Create(device_.get(), config(), kTokens, /*max_batch_tokens=*/0);
    EXPECT_TRUE(states.ok());
    const int64_t head_stride = kTokens * config().head_dim;
    std::vector<float> k(config().num_kv_heads * head_stride), v(k);
    std::vector<kernels::HeadWork> work(config().num_heads);
    for (int head = 0; head < config().num_heads; ++head) work[head].head = head;
    std::vector<std::vector<std::vector<double>>> mass;
    EXPECT_TRUE((*step)->Embed(*states, tokens_, 0, kTokens).ok());
    for (int layer = 0; layer < config().num_layers; ++layer) {
      EXPECT_TRUE((*step)
                      ->BeforeAttention(*states, layer,
                                        {.k = k.data(),
                                         .v = v.data(),
                                         .head_stride = head_stride,
                                         .token_stride = config().head_dim})
                      .ok());
      auto* queries = static_cast<float*>((*step)->queries());
      mass.push_back(ReferenceMass(config(), queries, k.data()));
      EXPECT_TRUE(device_->ops()
                      .Attention({.q = queries,
                                  .k = k.data(),
                                  .v = v.data(),
                                  .out = queries,
                                  .num_queries = kTokens,
                                  .num_keys = kTokens,
                                  .kv_head_stride = head_stride,
                                  .num_heads = config().num_heads,
                                  .num_kv_heads = config().num_kv_heads,
                                  .head_dim = config().head_dim,
                                  .block_tokens = kBlockTokens,
                                  .scale = 1.0f / std::sqrt(static_cast<float>(config().head_dim)),
                                  .work = work.data(),
                                  .num_work = config().num_heads})
                      .ok());
      EXPECT_TRUE((*step)->AfterAttention(*states, layer).ok());
    }
    return mass;
  }

  RandomCheckpoint checkpoint_;  // 4 query heads on 2 KV heads
  TemporaryFolder folder_;
  std::unique_ptr<Device> device_;
  Weights weights_;
  std::vector<uint32_t> tokens_;
  RecorderOptions options_;
  std::vector<double> image_;  // the file
  TensorMap tensors_;          // in it
};

TEST_F(AttentionRecorderTest, BlockMassOfEveryHeadIsThatOfTheWholeSoftmax) {
  Record();
  const auto reference = ReferenceOfAllLayers();
  for (int layer = 0; layer < config().num_layers; ++layer) {
    const auto mass = Values(layer, "block_mass");
    ASSERT_EQ(static_cast<int64_t>(mass.size()), config().num_heads * kBlocks * kBlocks);
    for (int head = 0; head < config().num_heads; ++head) {
      for (int64_t row = 0; row < kBlocks; ++row) {
        double sum = 0.0;
        for (int64_t column = 0; column < kBlocks; ++column) {
          const float value = mass[(head * kBlocks + row) * kBlocks + column];
          EXPECT_NEAR(value, reference[layer][head][row * kBlocks + column], kTolerance)
              << "layer " << layer << " head " << head << " row " << row << " column " << column;
          if (column > row) {
            EXPECT_EQ(value, 0.0f);
          }
          sum += value;
        }
        EXPECT_NEAR(sum, 1.0, 1e-3);
      }
    }
  }
}

TEST_F(AttentionRecorderTest, TheEstimateByBlocksByColumnsAndByDiagonalsIsOneDistribution) {
  Record();
  for (int layer = 0; layer < config().num_layers; ++layer) {
    for (int head = 0; head < config().num_heads; ++head) {
      const auto estimate = Values(layer, "estimate").subspan(head * kBlocks, kBlocks);
      const auto vertical = Values(layer, "vertical").subspan(head * kTokens, kTokens);
      const auto slash = Values(layer, "slash").subspan(head * kTokens, kTokens);
      for (int64_t block = 0; block < kBlocks; ++block) {
        const int64_t first = block * kBlockTokens;
        const int64_t end = std::min(first + kBlockTokens, kTokens);
        const double of_columns =
            std::accumulate(vertical.begin() + first, vertical.begin() + end, 0.0);
        EXPECT_NEAR(estimate[block], of_columns, kTolerance);
      }
      EXPECT_NEAR(std::accumulate(slash.begin(), slash.end(), 0.0), 1.0, 1e-3);
    }
  }
}

TEST_F(AttentionRecorderTest, VerticalSlashOfEverythingHoldsEverything) {
  options_.min_budget_tokens = kTokens;
  Record();
  for (float mass : Values(1, "vertical_slash_mass")) EXPECT_NEAR(mass, 1.0f, kTolerance);
  for (float density : Values(1, "vertical_slash_density")) EXPECT_EQ(density, 1.0f);
  options_.min_budget_tokens = 0;
  options_.gamma = 0.01f;  // column 0 and the diagonal, and next to nothing else
  Record();
  for (float mass : Values(1, "vertical_slash_mass")) EXPECT_LT(mass, 0.99f);
  for (float density : Values(1, "vertical_slash_density")) EXPECT_LT(density, 1.0f);
}

TEST_F(AttentionRecorderTest, AGridJoinsWholeBlocks) {
  Record();
  std::vector<std::vector<float>> blocks;
  for (int layer = 0; layer < config().num_layers; ++layer) {
    const auto values = Values(layer, "block_mass");
    blocks.emplace_back(values.begin(), values.end());
  }
  options_.max_grid = 2;  // 5 blocks: cells of 3, so 2 a side
  Record();
  for (int layer = 0; layer < config().num_layers; ++layer) {
    const auto cells = Values(layer, "block_mass");
    ASSERT_EQ(cells.size(), config().num_heads * 4u);
    for (int head = 0; head < config().num_heads; ++head) {
      std::vector<float> joined(4);
      JoinBlocks(
          absl::MakeConstSpan(blocks[layer]).subspan(head * kBlocks * kBlocks, kBlocks * kBlocks),
          kTokens, kBlockTokens, 3, absl::MakeSpan(joined));
      EXPECT_THAT(cells.subspan(head * 4, 4), testing::Pointwise(testing::FloatEq(), joined));
    }
  }
}

TEST(JoinBlocks, SumsColumnsAndAveragesQueries) {
  // There are seven tokens in blocks of 2, so the last query is alone in its block and counts once,
  // not twice.
  const std::vector<float> blocks = {1.0f, 0.0f, 0.0f, 0.0f,  //
                                     0.4f, 0.6f, 0.0f, 0.0f,  //
                                     0.2f, 0.2f, 0.6f, 0.0f,  //
                                     0.5f, 0.1f, 0.1f, 0.3f};
  std::vector<float> cells(4);
  JoinBlocks(blocks, 7, 2, 2, absl::MakeSpan(cells));
  const std::vector<float> expected = {1.0f, 0.0f,  //
                                       (2 * 0.4f + 0.6f) / 3, (2 * 0.6f + 0.4f) / 3};
  EXPECT_THAT(cells, testing::Pointwise(testing::FloatNear(1e-6f), expected));
}

}  // namespace
}  // namespace prefilld::model
