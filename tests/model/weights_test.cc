#include "model/checkpoint/weights.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <functional>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "model/checkpoint/safetensors.h"
#include "model/checkpoint/weight_conversion.h"
#include "tests/model/random_checkpoint.h"
#include "tests/model/safetensors_image.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using kernels::DType;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kQ[] = "model.layers.1.self_attn.q_proj.weight";

// A model of two layers with every tensor that a layer can have.
ModelConfig FullConfig() {
  ModelConfig config = SmallRandomConfig();
  config.family = Family::kQwen3;
  config.num_layers = 2;
  config.qkv_bias = config.output_bias = config.qk_norm = true;
  return config;
}

std::vector<ImageTensor> ReadTensors(const std::string& dir) {
  std::vector<ImageTensor> tensors;
  const auto checkpoint = Checkpoint::Open(dir);
  if (!checkpoint.ok()) return tensors;
  for (const auto& [name, tensor] : (*checkpoint)->tensors()) {
    tensors.push_back({name, "BF16", tensor.shape,
                       std::string(reinterpret_cast<const char*>(tensor.data), tensor.bytes)});
  }
  return tensors;
}

ImageTensor& Named(std::vector<ImageTensor>& tensors, absl::string_view name) {
  return *std::find_if(tensors.begin(), tensors.end(),
                       [&](const auto& t) { return t.name == name; });
}

class LoadWeightsTest : public testing::Test {
 protected:
  LoadWeightsTest() : checkpoint_(FullConfig()), device_(*CreateDevice(DeviceChoice::kCpu, 2)) {}

  absl::StatusOr<Weights> Load(const std::string& dir, const ModelConfig& config) {
    return LoadWeights(dir, config, *device_);
  }

  std::string Refusal(const std::function<void(std::vector<ImageTensor>&)>& edit) {
    return std::string(LoadEdited(edit).status().message());
  }

  // Loads the checkpoint's weights after `edit`, from one file.
  absl::StatusOr<Weights> LoadEdited(const std::function<void(std::vector<ImageTensor>&)>& edit) {
    std::vector<ImageTensor> tensors = ReadTensors(checkpoint_.dir());
    edit(tensors);
    TemporaryFolder folder;
    folder.Write("model.safetensors", SafetensorsImage(tensors));
    return Load(folder.path(), checkpoint_.config());
  }

  std::vector<float> Download(const DeviceBuffer& buffer) {
    std::vector<float> values(buffer.bytes() / sizeof(float));
    EXPECT_TRUE(device_->Download(values.data(), buffer.data(), buffer.bytes()).ok());
    return values;
  }

  // Returns the named tensors of the file, one after the other.
  std::vector<float> Expected(const std::string& dir, const std::vector<std::string>& names) {
    const auto checkpoint = Checkpoint::Open(dir);
    std::vector<float> values;
    for (const std::string& name : names) {
      const Tensor* tensor = *(*checkpoint)->Find(name);
      const size_t count = tensor->bytes / SizeOf(tensor->dtype);
      values.resize(values.size() + count);
      ConvertElements(tensor->dtype, tensor->data, DType::kFp32,
                      values.data() + values.size() - count, static_cast<int64_t>(count));
    }
    return values;
  }

  RandomCheckpoint checkpoint_;
  std::unique_ptr<Device> device_;
};

TEST_F(LoadWeightsTest, FusesProjectionsInOrder) {
  const auto weights = Load(checkpoint_.dir(), checkpoint_.config());
  ASSERT_TRUE(weights.ok()) << weights.status();
  ASSERT_EQ(weights->layers.size(), 2u);
  const LayerWeights& layer = weights->layers[1];
  const auto expect = [&](const DeviceBuffer& buffer, std::vector<std::string> names) {
    for (std::string& name : names) name.insert(0, "model.layers.1.");
    EXPECT_EQ(Download(buffer), Expected(checkpoint_.dir(), names)) << names[0];
  };
  expect(layer.input_norm, {"input_layernorm.weight"});
  expect(layer.qkv,
         {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"});
  expect(layer.qkv_bias,
         {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"});
  expect(layer.q_norm, {"self_attn.q_norm.weight"});
  expect(layer.k_norm, {"self_attn.k_norm.weight"});
  expect(layer.output, {"self_attn.o_proj.weight"});
  expect(layer.output_bias, {"self_attn.o_proj.bias"});
  expect(layer.post_norm, {"post_attention_layernorm.weight"});
  expect(layer.gate_up, {"mlp.gate_proj.weight", "mlp.up_proj.weight"});
  expect(layer.down, {"mlp.down_proj.weight"});
  EXPECT_EQ(Download(weights->embedding),
            Expected(checkpoint_.dir(), {"model.embed_tokens.weight"}));
  EXPECT_EQ(Download(weights->final_norm), Expected(checkpoint_.dir(), {"model.norm.weight"}));
  EXPECT_EQ(Download(weights->head), Expected(checkpoint_.dir(), {"lm_head.weight"}));
  EXPECT_EQ(weights->head_data(), weights->head.data());
}

TEST_F(LoadWeightsTest, TiedModelsUseTheEmbeddingEvenWhereTheFileRepeatsIt) {
  ModelConfig config = checkpoint_.config();
  config.tied_embeddings = true;
  const auto weights = Load(checkpoint_.dir(), config);  // has lm_head.weight
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(weights->head.data(), nullptr);
  EXPECT_EQ(weights->head_data(), weights->embedding.data());
}

TEST_F(LoadWeightsTest, LoadsTensorsLargerThanOneStretch) {
  ModelConfig config = SmallRandomConfig();
  config.num_layers = 1;
  config.vocab_size = 20000;  // times 128: above 2^21 elements
  const RandomCheckpoint large(config);
  const auto weights = Load(large.dir(), config);
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_EQ(Download(weights->embedding), Expected(large.dir(), {"model.embed_tokens.weight"}));
  EXPECT_EQ(Download(weights->head), Expected(large.dir(), {"lm_head.weight"}));
}

TEST_F(LoadWeightsTest, RefusesWhatDoesNotFitTheConfig) {
  EXPECT_THAT(Refusal([](auto& tensors) { tensors.pop_back(); }),
              HasSubstr("tensor model.norm.weight is missing"));
  EXPECT_THAT(Refusal([](auto& tensors) {
                Named(tensors, kQ).shape = {128, 256};
              }),
              HasSubstr(absl::StrCat("tensor ", kQ,
                                     " has shape [128, 256]; config.json asks for [256, 128]")));
  EXPECT_THAT(Refusal([](auto& tensors) {
                tensors.push_back({"model.layers.1.mlp.router.weight", "BF16", {1}, "xx"});
              }),
              HasSubstr("tensor model.layers.1.mlp.router.weight has no place in the model"));
  EXPECT_THAT(Refusal([](auto& tensors) {
                tensors.push_back({"lm_head.bias", "BF16", {1}, "xx"});
              }),
              HasSubstr("tensor lm_head.bias has no place in the model"));
}

// Nothing about a tensor that is not read is a reason to refuse the model.
TEST_F(LoadWeightsTest, LeavesAloneWhatTheModelDoesNotUse) {
  const auto weights = LoadEdited([](auto& tensors) {
    tensors.push_back({"model.layers.2.mlp.up_proj.weight", "F8_E4M3", {9, 9, 9}, "xx"});
    tensors.push_back({"model.layers.0.self_attn.bias", "BOOL", {1, 1}, "x"});
    tensors.push_back({"v_head.summary.weight", "BF16", {1}, "xx"});
  });
  ASSERT_TRUE(weights.ok()) << weights.status();
  EXPECT_THAT(weights->unused_tensors,
              ElementsAre("model.layers.0.self_attn.bias", "model.layers.2.mlp.up_proj.weight",
                          "v_head.summary.weight"));
  EXPECT_EQ(weights->fingerprint, Load(checkpoint_.dir(), checkpoint_.config())->fingerprint);
}

TEST_F(LoadWeightsTest, TiedModelsDoNotNeedTheHeadThatAnIndexNames) {
  std::vector<ImageTensor> tensors = ReadTensors(checkpoint_.dir());
  tensors.erase(std::find_if(tensors.begin(), tensors.end(),
                             [](const auto& t) { return t.name == "lm_head.weight"; }));
  ModelConfig config = checkpoint_.config();
  for (const char* shard : {"all.safetensors", "gone.safetensors"}) {
    TemporaryFolder folder;
    folder.Write("all.safetensors", SafetensorsImage(tensors));
    folder.Write("model.safetensors.index.json",
                 absl::StrCat(R"({"weight_map":{"model.norm.weight":"all.safetensors",)",
                              R"("lm_head.weight":")", shard, "\"}}"));
    config.tied_embeddings = true;
    EXPECT_TRUE(Load(folder.path(), config).ok()) << Load(folder.path(), config).status();
    config.tied_embeddings = false;
    EXPECT_THAT(std::string(Load(folder.path(), config).status().message()),
                AllOf(HasSubstr("tensor lm_head.weight is missing"), HasSubstr(shard)));
  }
}

TEST_F(LoadWeightsTest, SaysThatTheFilesAreQuantised) {
  const auto rename = [](const char* suffix) {
    return [=](auto& tensors) {
      ImageTensor& q = Named(tensors, kQ);
      q.name = absl::StrCat(absl::StripSuffix(kQ, ".weight"), suffix);
      q.dtype = "I32";
    };
  };
  for (const char* suffix : {".qweight", ".weight_packed", ".weight"}) {
    EXPECT_THAT(Refusal(rename(suffix)),
                AllOf(HasSubstr(kQ), HasSubstr("the files hold quantised weights"),
                      HasSubstr("use the model's original checkpoint")));
  }
}

// The values are the same wherever the data begin, and so is the fingerprint.
TEST_F(LoadWeightsTest, LoadsFilesWhoseHeaderIsNotPadded) {
  const std::string padded = SafetensorsImage(ReadTensors(checkpoint_.dir()));
  uint64_t length = 0;
  std::memcpy(&length, padded.data(), sizeof(length));
  const std::string original = Load(checkpoint_.dir(), checkpoint_.config())->fingerprint;
  for (const size_t spaces : {1, 2, 3}) {
    const std::string header = padded.substr(sizeof(length), length) + std::string(spaces, ' ');
    TemporaryFolder folder;
    folder.Write("model.safetensors",
                 RawSafetensors(header, padded.substr(sizeof(length) + length)));
    const auto weights = Load(folder.path(), checkpoint_.config());
    ASSERT_TRUE(weights.ok()) << weights.status();
    EXPECT_EQ(weights->fingerprint, original);
    EXPECT_EQ(Download(weights->layers[1].down),
              Expected(checkpoint_.dir(), {"model.layers.1.mlp.down_proj.weight"}));
  }
}

TEST_F(LoadWeightsTest, IgnoresStoredRotaryFrequencies) {
  const auto weights = LoadEdited([](auto& tensors) {
    tensors.push_back({"model.layers.0.self_attn.rotary_emb.inv_freq", "BF16", {1}, "xx"});
  });
  EXPECT_TRUE(weights.ok()) << weights.status();
}

TEST_F(LoadWeightsTest, FingerprintIsThatOfTheContent) {
  const auto original = Load(checkpoint_.dir(), checkpoint_.config());
  ASSERT_TRUE(original.ok()) << original.status();
  EXPECT_THAT(original->fingerprint, ::testing::MatchesRegex("[0-9a-f]{32}"));

  const auto copy = LoadEdited([](auto&) {});
  const auto changed = LoadEdited([](auto& tensors) { Named(tensors, kQ).bytes[30000] ^= 1; });
  const auto swapped = LoadEdited([](auto& tensors) {
    std::swap(Named(tensors, "model.layers.0.mlp.up_proj.weight").bytes,
              Named(tensors, "model.layers.1.mlp.up_proj.weight").bytes);
  });
  ASSERT_TRUE(copy.ok() && changed.ok() && swapped.ok());
  EXPECT_EQ(copy->fingerprint, original->fingerprint);
  EXPECT_NE(changed->fingerprint, original->fingerprint);
  EXPECT_NE(swapped->fingerprint, original->fingerprint);
}

TEST_F(LoadWeightsTest, FingerprintDoesNotDependOnSharding) {
  const std::vector<ImageTensor> tensors = ReadTensors(checkpoint_.dir());
  const auto middle = tensors.begin() + static_cast<ptrdiff_t>(tensors.size() / 2);
  TemporaryFolder folder;
  folder.Write("a.safetensors", SafetensorsImage({middle, tensors.end()}));
  folder.Write("b.safetensors", SafetensorsImage({tensors.begin(), middle}));
  std::string map;
  for (auto t = tensors.begin(); t != tensors.end(); ++t) {
    absl::StrAppend(&map, map.empty() ? "" : ",", "\"", t->name, "\":\"", t < middle ? "b" : "a",
                    ".safetensors\"");
  }
  folder.Write("model.safetensors.index.json", absl::StrCat("{\"weight_map\":{", map, "}}"));
  const auto sharded = Load(folder.path(), checkpoint_.config());
  ASSERT_TRUE(sharded.ok()) << sharded.status();
  EXPECT_EQ(sharded->fingerprint, Load(checkpoint_.dir(), checkpoint_.config())->fingerprint);
}

TEST_F(LoadWeightsTest, FingerprintCoversWhatTheConfigChanges) {
  const std::string original = Load(checkpoint_.dir(), checkpoint_.config())->fingerprint;
  const auto with = [&](const std::function<void(ModelConfig&)>& edit) {
    ModelConfig config = checkpoint_.config();
    edit(config);
    return Load(checkpoint_.dir(), config)->fingerprint;
  };
  EXPECT_NE(with([](ModelConfig& c) { c.rms_norm_epsilon *= 2; }), original);
  EXPECT_NE(with([](ModelConfig& c) { c.rope.theta += 1; }), original);
  EXPECT_NE(with([](ModelConfig& c) { c.rope.kind = RopeKind::kLinear; }), original);
  EXPECT_EQ(with([](ModelConfig& c) { c.eos_token_ids.push_back(7); }), original);
}

}  // namespace
}  // namespace prefilld::model
