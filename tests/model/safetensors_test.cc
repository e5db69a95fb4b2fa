#include "model/checkpoint/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <random>

#include "absl/strings/str_cat.h"
#include "model/checkpoint/weight_conversion.h"
#include "tests/model/safetensors_image.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::SizeIs;

// The memory of a file, aligned as a mapping is.
class AlignedImage {
 public:
  explicit AlignedImage(const std::string& content)
      : words_((content.size() + 7) / 8), bytes_(content.size()) {
    if (!content.empty()) std::memcpy(words_.data(), content.data(), content.size());
  }
  absl::Span<const std::byte> span() const {
    return {reinterpret_cast<const std::byte*>(words_.data()), bytes_};
  }

 private:
  std::vector<uint64_t> words_;
  size_t bytes_;
};

std::string Reason(const absl::Status& status) { return std::string(status.message()); }

absl::Status Parse(const std::string& content) {
  return ParseSafetensors(AlignedImage(content).span()).status();
}

// Parses a header, padded to the alignment that writers keep, before `data_bytes` zeros.
absl::Status ParseHeader(std::string header, size_t data_bytes) {
  header.resize((header.size() + 7) / 8 * 8, ' ');
  return Parse(RawSafetensors(header, std::string(data_bytes, '\0')));
}

std::string ValidImage() {
  return SafetensorsImage({{"a", "F32", {2, 3}, std::string(24, 'a')},
                           {"b", "BF16", {4}, std::string(8, 'b')},
                           {"scalar", "F16", {}, std::string(2, 'c')},
                           {"empty", "F32", {0, 5}, ""}});
}

TEST(ParseSafetensors, FindsEveryTensorOfAValidFile) {
  const AlignedImage image(ValidImage());
  const absl::StatusOr<TensorMap> tensors = ParseSafetensors(image.span());
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  ASSERT_THAT(*tensors, SizeIs(4));
  const Tensor& a = tensors->at("a");
  EXPECT_EQ(a.dtype, kernels::DType::kFp32);
  EXPECT_THAT(a.shape, ElementsAre(2, 3));
  EXPECT_EQ(std::string(reinterpret_cast<const char*>(a.data), a.bytes), std::string(24, 'a'));
  EXPECT_EQ(tensors->at("b").dtype, kernels::DType::kBf16);
  EXPECT_EQ(tensors->at("scalar").bytes, 2u);
  EXPECT_EQ(tensors->at("empty").bytes, 0u);
}

// Nothing in the format aligns the data: a header may have any length, and tensors of 2 bytes may
// stand before those of 4.
TEST(ParseSafetensors, FindsTensorsAtAnyAddress) {
  constexpr char kHeader[] = R"({"half":{"dtype":"F16","shape":[1],"data_offsets":[0,2]},)"
                             R"("one":{"dtype":"F32","shape":[2],"data_offsets":[2,10]}})";
  const std::string data("hh\x00\x00\x80\x3f\x00\x00\x00\x40", 10);  // 1.0f and 2.0f
  for (size_t padding = 0; padding < 8; ++padding) {
    const AlignedImage image(RawSafetensors(kHeader + std::string(padding, ' '), data));
    const absl::StatusOr<TensorMap> tensors = ParseSafetensors(image.span());
    ASSERT_TRUE(tensors.ok()) << padding << ": " << tensors.status();
    const Tensor& one = tensors->at("one");
    float values[2];
    ConvertElements(one.dtype, one.data, kernels::DType::kFp32, values, 2);
    EXPECT_THAT(values, ElementsAre(1.0f, 2.0f)) << padding;
  }
}

TEST(ParseSafetensors, RefusesAFileTooShortForItsHeader) {
  EXPECT_THAT(Reason(Parse("")), HasSubstr("too short"));
  EXPECT_THAT(Reason(Parse("1234567")), HasSubstr("too short"));
  const std::string huge_length(8, '\xff');
  EXPECT_THAT(Reason(Parse(huge_length + "{}")), HasSubstr("header length"));
  const std::string over_limit =
      RawSafetensors(std::string(kMaxSafetensorsHeaderBytes + 1, ' '), "");
  EXPECT_THAT(Reason(Parse(over_limit)), HasSubstr("limit of"));
}

TEST(ParseSafetensors, RefusesEveryTruncation) {
  const std::string image = ValidImage();
  for (size_t size = 0; size < image.size(); ++size) {
    EXPECT_FALSE(Parse(image.substr(0, size)).ok()) << size;
  }
  EXPECT_THAT(Reason(Parse(image + "x")), HasSubstr("belong to no tensor"));
}

struct BadHeader {
  const char* header;
  size_t data_bytes;
  const char* reason;
};

class BadHeaderTest : public testing::TestWithParam<BadHeader> {};

TEST_P(BadHeaderTest, IsRefusedWithItsReason) {
  const absl::Status status = ParseHeader(GetParam().header, GetParam().data_bytes);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << GetParam().header;
  EXPECT_THAT(std::string(status.message()), HasSubstr(GetParam().reason)) << GetParam().header;
}

INSTANTIATE_TEST_SUITE_P(
    , BadHeaderTest,
    testing::Values(
        BadHeader{"", 0, "not JSON"}, BadHeader{"[]", 0, "not a JSON object"},
        BadHeader{R"({"a":)", 0, "not JSON"}, BadHeader{"{} {}", 0, "not JSON"},
        BadHeader{"{\"\xff\xfe\":1}", 0, "not JSON"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[[[1]]],"data_offsets":[0,4]}})", 4,
                  "nested deeper"},
        BadHeader{R"({"a":1})", 0, "expected dtype, shape and data_offsets"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1]}})", 4, "expected dtype"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"x":1}})", 4,
                  "expected dtype"},
        BadHeader{R"({"__metadata__":{"a":1}})", 0, "is not a string"},
        BadHeader{R"({"__metadata__":[]})", 0, "__metadata__ is not an object"},
        // dtypes
        BadHeader{R"({"a":{"dtype":7,"shape":[1],"data_offsets":[0,4]}})", 4,
                  "tensor \"a\": dtype 7 is not a name"},
        BadHeader{R"({"a":{"dtype":"I8","shape":[4],"data_offsets":[0,8]}})", 4, "do not lie"},
        // shapes
        BadHeader{R"({"a":{"dtype":"F32","shape":4,"data_offsets":[0,4]}})", 4, "is not an array"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}})", 4, "out of range"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}})", 4, "out of range"},
        BadHeader{R"({"a":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}})", 4, "out of range"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1,1,1,1,1,1,1,1,1],"data_offsets":[0,4]}})", 4,
                  "at most 8 dimensions"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}})", 0,
                  "out of range"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}})",
                  0, "out of range"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[18446744073709551615],"data_offsets":[0,4]}})", 4,
                  "out of range"},
        // offsets
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,8]}})", 4, "do not lie"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}})", 4, "do not lie"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}})", 4, "do not lie"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0]}})", 4, "do not lie"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}})", 4,
                  "do not lie"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4,
                  "hold 4 bytes; shape [2] of fp32 needs 8"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                  R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                  8, "tensor \"b\" overlaps"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                  R"("b":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})",
                  12, "tensor \"b\" leaves a hole"},
        BadHeader{R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                  R"("a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                  8, "key \"a\" twice"}));

// Whatever bytes change, the parser returns, and the tensors it accepts lie within the file.
TEST(ParseSafetensors, SurvivesMutatedFiles) {
  const std::string valid = ValidImage();
  const std::string alphabet = "{}[]\",:-0123456789.eE \\\xff";
  std::mt19937 random(20240607);
  int accepted = 0;
  for (int round = 0; round < 20000; ++round) {
    std::string image = valid;
    for (uint32_t edits = 1 + random() % 4; edits > 0; --edits) {
      const size_t at = random() % image.size();
      switch (random() % 4) {
        case 0:
          image[at] = static_cast<char>(random());
          break;
        case 1:
          image[at] = alphabet[random() % alphabet.size()];
          break;
        case 2:
          image.insert(at, 1, alphabet[random() % alphabet.size()]);
          break;
        case 3:
          image.erase(at, 1 + random() % 3);
          break;
      }
      if (image.empty()) image = "x";
    }
    const AlignedImage file(image);
    const absl::StatusOr<TensorMap> tensors = ParseSafetensors(file.span());
    if (!tensors.ok()) continue;
    ++accepted;
    for (const auto& [name, tensor] : *tensors) {
      ASSERT_GE(tensor.data, file.span().data());
      ASSERT_LE(tensor.data + tensor.bytes, file.span().data() + file.span().size());
    }
  }
  EXPECT_GT(accepted, 0);  // changed data bytes are no error
}

std::string Shard(const std::string& name, char fill = 'x') {
  return SafetensorsImage({{name, "F32", {2}, std::string(8, fill)}});
}

std::string Index(const std::string& weight_map) {
  return absl::StrCat(R"({"metadata":{"total_size":16},"weight_map":)", weight_map, "}");
}

TEST(Checkpoint, OpensASingleFile) {
  TemporaryFolder folder;
  folder.Write("model.safetensors", ValidImage());
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_THAT((*checkpoint)->tensors(), SizeIs(4));
  EXPECT_TRUE((*checkpoint)->Find("a").ok());
  EXPECT_THAT(Reason((*checkpoint)->Find("z").status()), HasSubstr("tensor z is missing"));
}

TEST(Checkpoint, JoinsTheShardsOfAnIndex) {
  TemporaryFolder folder;
  folder.Write("one.safetensors", Shard("a", 'a'));
  folder.Write("two.safetensors", Shard("b", 'b'));
  folder.Write("model.safetensors.index.json",
               Index(R"({"a":"one.safetensors","b":"two.safetensors"})"));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(static_cast<char>(*(*(*checkpoint)->Find("a"))->data), 'a');
  EXPECT_EQ(static_cast<char>(*(*(*checkpoint)->Find("b"))->data), 'b');
}

TEST(Checkpoint, NamesTheFileThatIsMissingOrBroken) {
  TemporaryFolder folder;
  EXPECT_EQ(Checkpoint::Open(folder.path()).status().code(), absl::StatusCode::kNotFound);
  folder.Write("model.safetensors", "");
  EXPECT_THAT(Reason(Checkpoint::Open(folder.path()).status()),
              HasSubstr("model.safetensors: empty"));
  folder.Write("model.safetensors", ValidImage().substr(0, 100));
  EXPECT_THAT(Reason(Checkpoint::Open(folder.path()).status()),
              AllOf(HasSubstr(folder.path()), HasSubstr("header length")));
  folder.Write("model.safetensors.index.json", Index(R"({"a":"gone.safetensors"})"));
  EXPECT_THAT(Reason(Checkpoint::Open(folder.path()).status()), HasSubstr("gone.safetensors"));
}

TEST(Checkpoint, RefusesShardNamesThatLeaveTheFolder) {
  TemporaryFolder outside;
  outside.Write("x.safetensors", Shard("a"));
  TemporaryFolder folder;
  for (const std::string& name :
       {absl::StrCat(outside.path(), "/x.safetensors"), std::string("../x.safetensors"),
        std::string("sub/x.safetensors"), std::string("..\\\\x.safetensors"), std::string(""),
        std::string(".safetensors"), std::string("config.json"),
        std::string("x\\u0000.safetensors")}) {
    folder.Write("model.safetensors.index.json", Index(absl::StrCat(R"({"a":")", name, "\"}")));
    EXPECT_THAT(Reason(Checkpoint::Open(folder.path()).status()),
                HasSubstr("is not the name of a .safetensors file in this folder"))
        << name;
  }
}

TEST(Checkpoint, LacksWhatTheIndexNamesOnlyIfItIsAskedFor) {
  TemporaryFolder folder;
  folder.Write("one.safetensors", Shard("a"));
  folder.Write("model.safetensors.index.json",
               Index(R"({"a":"one.safetensors","b":"one.safetensors","c":"gone.safetensors"})"));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE((*checkpoint)->Find("a").ok());
  EXPECT_THAT(Reason((*checkpoint)->Find("b").status()),
              HasSubstr("tensor b is missing in the file that the index names for it, "
                        "one.safetensors"));
  EXPECT_THAT(Reason((*checkpoint)->Find("c").status()),
              HasSubstr("tensor c is missing, and so is the file that the index names for it, "
                        "gone.safetensors"));
}

TEST(Checkpoint, RefusesAnElementTypeOnlyIfItIsAskedFor) {
  TemporaryFolder folder;
  folder.Write("model.safetensors", SafetensorsImage({{"a", "F32", {1}, "aaaa"},
                                                      {"mask", "BOOL", {3}, "mmm"},
                                                      {"packed", "F4", {3}, "pp"}}));
  const auto checkpoint = Checkpoint::Open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_TRUE((*checkpoint)->Find("a").ok());
  EXPECT_THAT(Reason((*checkpoint)->Find("mask").status()),
              HasSubstr("tensor mask: dtype \"BOOL\" unsupported; built for BF16, F16, F32"));
}

constexpr char kLfsPointer[] =
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 4976698672\n";

TEST(Checkpoint, RecognisesAGitLfsPointer) {
  const auto reason = [](const char* file) {
    TemporaryFolder folder;
    folder.Write("model-1.safetensors", Shard("a"));
    folder.Write("model.safetensors.index.json", Index(R"({"a":"model-1.safetensors"})"));
    folder.Write(file, kLfsPointer);
    return Reason(Checkpoint::Open(folder.path()).status());
  };
  for (const char* file : {"model-1.safetensors", "model.safetensors.index.json"}) {
    EXPECT_THAT(reason(file), AllOf(HasSubstr(absl::StrCat(file, ": is a Git LFS pointer")),
                                    HasSubstr("of 4976698672 bytes"), HasSubstr("git lfs pull")));
  }
}

TEST(Checkpoint, ShowsAFileThatIsText) {
  TemporaryFolder folder;
  folder.Write("model.safetensors", "<!DOCTYPE html><html>not found</html>");
  EXPECT_THAT(Reason(Checkpoint::Open(folder.path()).status()),
              HasSubstr("model.safetensors: begins with the text \"<!DOCTYP\""));
}

TEST(Checkpoint, RefusesAnIndexThatDisagreesWithItsShards) {
  TemporaryFolder folder;
  folder.Write("one.safetensors", Shard("a"));
  folder.Write("two.safetensors", Shard("a"));
  const auto open = [&](const std::string& weight_map) {
    folder.Write("model.safetensors.index.json", Index(weight_map));
    return std::string(Checkpoint::Open(folder.path()).status().message());
  };
  EXPECT_THAT(open(R"({"a":"one.safetensors","b":"two.safetensors"})"),
              HasSubstr("tensor \"a\" is also in another shard"));
  EXPECT_THAT(open("{}"), HasSubstr("no weight_map"));
  EXPECT_THAT(open("[1]"), HasSubstr("no weight_map"));
  EXPECT_THAT(open(R"({"a":1})"), HasSubstr("weight_map[\"a\"] = 1 is not"));
}

}  // namespace
}  // namespace prefilld::model
