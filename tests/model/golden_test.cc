// Tests that prefill with dense attention equals Hugging Face transformers in every layer's K and V
// and in the logits, and that the log-probabilities of the prompt follow from such logits.
//
//   golden_test [--device=cpu|cuda] [--goldens=DIR]
//
// DIR is a folder as tests/python/make_goldens.py writes it, by default the committed one.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/types/span.h"
#include "model/prefill/prefill_engine.h"
#include "tests/model/golden.h"
#include "tests/model/prompt_run.h"

namespace prefilld::model {
namespace {

namespace fs = std::filesystem;

DeviceChoice device = DeviceChoice::kCpu;
std::string goldens_dir = "tests/model/goldens";
double worst_relative = 0.0;  // error of all comparisons

// fp32 differs by the order of sums alone, while bf16 rounds every activation to 8 bits.
struct Tolerance {
  double relative;
  double cosine;
};
Tolerance DeviceTolerance() {
  return device == DeviceChoice::kCpu ? Tolerance{1e-4, 0.999999} : Tolerance{2e-2, 0.999};
}

void ExpectClose(absl::Span<const float> actual, absl::Span<const float> expected,
                 const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double error = 0, dot = 0, actual_norm = 0, expected_norm = 0;
  for (size_t i = 0; i < actual.size(); ++i) {
    const double a = actual[i], e = expected[i];
    error += (a - e) * (a - e);
    dot += a * e;
    actual_norm += a * a;
    expected_norm += e * e;
  }
  const double relative = std::sqrt(error / expected_norm);
  const double cosine = dot / std::sqrt(actual_norm * expected_norm);
  const Tolerance tolerance = DeviceTolerance();
  worst_relative = std::max(worst_relative, relative);
  EXPECT_LE(relative, tolerance.relative) << what;  // false for NaN
  EXPECT_GE(cosine, tolerance.cosine) << what;
}

// K or V of one layer as transformers computed it, [num_tokens, num_kv_heads, head_dim].
class LayerTensor {
 public:
  LayerTensor(const float* data, int64_t row) : data_(data), row_(static_cast<size_t>(row)) {}

  std::vector<float> Rows(absl::Span<const float> positions) const {
    std::vector<float> rows;
    for (const float position : positions) {
      const float* row = data_ + static_cast<size_t>(position) * row_;
      rows.insert(rows.end(), row, row + row_);
    }
    return rows;
  }

  std::vector<float> SignedSum(absl::Span<const float> signs) const {
    std::vector<double> sum(row_);
    for (size_t t = 0; t < signs.size(); ++t) {
      for (size_t i = 0; i < row_; ++i) sum[i] += signs[t] * double{data_[t * row_ + i]};
    }
    return {sum.begin(), sum.end()};
  }

 private:
  const float* data_;
  size_t row_;
};

struct Prompt {
  std::string case_name;
  int64_t num_tokens;
};

void PrintTo(const Prompt& prompt, std::ostream* out) {
  *out << prompt.case_name << ", " << prompt.num_tokens << " tokens";
}

// Lists every length of every case of the folder.
std::vector<Prompt> ListPrompts() {
  std::vector<Prompt> prompts;
  for (const auto& entry : fs::directory_iterator(goldens_dir)) {
    if (!entry.is_directory()) continue;
    const GoldenFile golden(entry.path() / "golden.safetensors");
    for (const int64_t length : golden.lengths()) {
      prompts.push_back({entry.path().filename(), length});
    }
  }
  std::sort(prompts.begin(), prompts.end(), [](const Prompt& a, const Prompt& b) {
    return std::pair(a.case_name, a.num_tokens) < std::pair(b.case_name, b.num_tokens);
  });
  return prompts;
}

// The model of a case, made once for all its prompts.
class GoldenModel {
 public:
  explicit GoldenModel(const std::string& name)
      : case_dir_(absl::StrCat(goldens_dir, "/", name)),
        golden_(case_dir_ + "/golden.safetensors"),
        checkpoint_(case_dir_) {
    EngineOptions options;
    options.checkpoint_dir = checkpoint_.dir();
    options.device = device;
    options.max_tokens = golden_.lengths().back();
    engine_ = CreatePrefillEngine(options);
  }

  const GoldenFile& golden() const { return golden_; }
  absl::StatusOr<std::unique_ptr<PrefillEngine>>& engine() { return engine_; }

 private:
  std::string case_dir_;
  GoldenFile golden_;
  GoldenCheckpoint checkpoint_;
  absl::StatusOr<std::unique_ptr<PrefillEngine>> engine_;
};

class GoldenTest : public testing::TestWithParam<Prompt> {
 protected:
  static void TearDownTestSuite() { models_.clear(); }

  static GoldenModel& Model(const std::string& name) {
    std::unique_ptr<GoldenModel>& model = models_[name];
    if (!model) model = std::make_unique<GoldenModel>(name);
    return *model;
  }

 private:
  static inline std::map<std::string, std::unique_ptr<GoldenModel>> models_;
};

// Fetches the layer's KV as a consumer would, and compares it.
void CheckLayer(PrefillEngine& engine, PrefillSequence& sequence, int layer, int64_t num_tokens,
                const GoldenFile& golden) {
  const ModelConfig& config = engine.info().config;
  KvSelection selection;
  selection.num_blocks = kernels::CeilDiv(num_tokens, selection.block_tokens);
  selection.num_heads = config.num_kv_heads;
  selection.dtype = kernels::DType::kFp32;
  // In NHD order the blocks follow each other like rows.
  const int64_t row = int64_t{config.num_kv_heads} * config.head_dim;
  const int64_t elements = selection.num_blocks * selection.block_tokens * row;
  absl::StatusOr<DeviceBuffer> staging =
      engine.AllocateStaging(2 * static_cast<size_t>(elements) * sizeof(float));
  ASSERT_TRUE(staging.ok()) << staging.status();
  ASSERT_TRUE(sequence.PackKv(layer, selection, staging->data()).ok());

  const LayerTensor k(staging->as<float>(), row);
  const LayerTensor v(staging->as<float>() + elements, row);
  for (const auto& [name, tensor] : {std::pair("k", k), std::pair("v", v)}) {
    const std::string key = absl::StrCat(num_tokens, ".layer", layer, ".", name);
    const auto positions = golden.Get(absl::StrCat(num_tokens, ".positions"));
    const auto signs = golden.Get(absl::StrCat(num_tokens, ".signs"));
    ExpectClose(tensor.Rows(positions), golden.Get(key), key);
    ExpectClose(tensor.SignedSum(signs), golden.Get(key + "_sum"), key + "_sum");
  }
}

std::vector<uint32_t> TokensOf(const GoldenFile& golden, int64_t num_tokens) {
  const auto prompt = golden.Get(absl::StrCat(num_tokens, ".prompt"));
  return {prompt.begin(), prompt.end()};
}

TEST_P(GoldenTest, EqualsTransformers) {
  const int64_t num_tokens = GetParam().num_tokens;
  GoldenModel& model = Model(GetParam().case_name);
  ASSERT_TRUE(model.engine().ok()) << model.engine().status();
  const std::unique_ptr<PrefillEngine>& engine = *model.engine();
  const GoldenFile& golden = model.golden();

  auto sequence = engine->Start(TokensOf(golden, num_tokens), DenseAttention());
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  for (int layer = 0; layer < engine->info().config.num_layers; ++layer) {
    const auto report = (*sequence)->RunLayer();
    ASSERT_TRUE(report.ok()) << report.status();
    CheckLayer(*engine, **sequence, layer, num_tokens, golden);
    (*sequence)->ReleaseKv(layer);
  }
  const auto logits = (*sequence)->FinalLogits();
  ASSERT_TRUE(logits.ok()) << logits.status();
  ExpectClose(logits->front(), golden.Get(absl::StrCat(num_tokens, ".logits")), "logits");
}

// The log-probabilities of one run at some positions must equal those from the final logits of runs
// that end there.
TEST_P(GoldenTest, LogprobsAreThoseOfTheBeginningsLogits) {
  GoldenModel& model = Model(GetParam().case_name);
  ASSERT_TRUE(model.engine().ok()) << model.engine().status();
  PrefillEngine& engine = **model.engine();
  if (engine.info().config.rope.kind == RopeKind::kDynamicNtk) {
    GTEST_SKIP() << "a beginning is rotated otherwise than the whole";
  }
  const std::vector<uint32_t> tokens = TokensOf(model.golden(), GetParam().num_tokens);
  auto sequence = RunLayers(engine, tokens, DenseAttention(), /*logprobs=*/true);
  const PromptLogprobs logprobs = AllLogprobs(*sequence);
  sequence.reset();
  ASSERT_EQ(logprobs.of_token.size(), tokens.size() - 1);
  ASSERT_EQ(logprobs.of_best.size(), tokens.size() - 1);
  for (const size_t length : std::set<size_t>{1, tokens.size() / 2, tokens.size() - 1}) {
    if (length < 1 || length >= tokens.size()) continue;
    sequence = RunLayers(engine, absl::MakeConstSpan(tokens).first(length), DenseAttention(),
                         /*logprobs=*/false);
    const auto all_logits = sequence->FinalLogits();
    ASSERT_TRUE(all_logits.ok()) << all_logits.status();
    const std::vector<float>& logits = all_logits->front();
    sequence.reset();
    const double best = *std::max_element(logits.begin(), logits.end());
    // bf16 is spaced by up to 2^-7 of a logit. One step may be lost in the token's logit and one in
    // the likeliest's.
    const double largest = std::max(best, -double{*std::min_element(logits.begin(), logits.end())});
    const double tolerance = device == DeviceChoice::kCpu ? 1e-3 : largest / 64;
    double sum = 0;
    for (const float logit : logits) sum += std::exp(logit - best);
    const double of_token = logits[tokens[length]] - best - std::log(sum);
    EXPECT_NEAR(logprobs.of_token[length - 1], of_token, tolerance) << length;
    EXPECT_NEAR(logprobs.of_best[length - 1], -std::log(sum), tolerance) << length;
  }
}

// The list is evaluated after the flags are read.
INSTANTIATE_TEST_SUITE_P(, GoldenTest, testing::ValuesIn(ListPrompts()),
                         [](const testing::TestParamInfo<Prompt>& info) {
                           return absl::StrCat(info.param.case_name, "_", info.param.num_tokens);
                         });

bool ParseFlag(absl::string_view flag) {
  if (flag == "--device=cpu") {
    device = DeviceChoice::kCpu;
  } else if (flag == "--device=cuda") {
    device = DeviceChoice::kCuda;
  } else if (absl::ConsumePrefix(&flag, "--goldens=")) {
    goldens_dir = std::string(flag);
  } else {
    return absl::StartsWith(flag, "--gtest_");
  }
  return true;
}

}  // namespace
}  // namespace prefilld::model

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (!prefilld::model::ParseFlag(argv[i])) {
      std::fprintf(stderr, "unknown flag %s; see the top of golden_test.cc\n", argv[i]);
      return 2;
    }
  }
  testing::InitGoogleTest(&argc, argv);
  const int result = RUN_ALL_TESTS();
  std::printf("largest relative error %.1e, allowed %.1e\n", prefilld::model::worst_relative,
              prefilld::model::DeviceTolerance().relative);
  return result;
}
