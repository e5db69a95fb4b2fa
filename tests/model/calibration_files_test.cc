#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "model/calibration/calibration_prompt.h"
#include "model/calibration/safetensors_writer.h"
#include "model/checkpoint/safetensors.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
}

TEST(SafetensorsWriter, WritesWhatTheReaderReads) {
  TemporaryFolder folder;
  const std::string path = folder.path() + "/a.safetensors";
  auto writer = SafetensorsWriter::Create(path, {{"z", {2, 3}}, {"a", {1}}}, {{"prompt", "\"x\""}});
  ASSERT_TRUE(writer.ok()) << writer.status();
  // One piece ends within a tensor, and one spans two.
  ASSERT_TRUE((*writer)->Append({1.0f, 2.0f}).ok());
  ASSERT_TRUE((*writer)->Append({3.0f, 4.0f, 5.0f, 6.0f, 7.0f}).ok());
  EXPECT_FALSE(std::filesystem::exists(path));
  ASSERT_TRUE((*writer)->Finish().ok());

  const std::string bytes = ReadFile(path);
  std::vector<double> image(bytes.size() / sizeof(double) + 1);  // aligned
  std::memcpy(image.data(), bytes.data(), bytes.size());
  const auto tensors =
      ParseSafetensors({reinterpret_cast<const std::byte*>(image.data()), bytes.size()});
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  const auto* z = reinterpret_cast<const float*>(tensors->at("z").data);
  EXPECT_THAT(tensors->at("z").shape, ElementsAre(2, 3));
  EXPECT_THAT(std::vector<float>(z, z + 6), ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_EQ(*reinterpret_cast<const float*>(tensors->at("a").data), 7.0f);
}

TEST(SafetensorsWriter, LeavesNothingBehindUnlessItIsWhole) {
  TemporaryFolder folder;
  {
    auto writer = SafetensorsWriter::Create(folder.path() + "/a.safetensors", {{"z", {2}}}, {});
    ASSERT_TRUE(writer.ok());
    ASSERT_TRUE((*writer)->Append({1.0f}).ok());
    EXPECT_EQ((*writer)->Append({1.0f, 2.0f}).code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ((*writer)->Finish().code(), absl::StatusCode::kFailedPrecondition);
  }
  EXPECT_TRUE(std::filesystem::is_empty(folder.path()));
  const absl::Status no_folder =
      SafetensorsWriter::Create(folder.path() + "/none/a.safetensors", {}, {}).status();
  EXPECT_THAT(std::string(no_folder.message()), HasSubstr("/none/a.safetensors: No such file"));
}

TEST(CalibrationPrompt, ATextIsItsBytesBehindBos) {
  const auto prompt = ParseCalibrationPrompt("prompts/prose/one.txt", "A\xff", 256);
  ASSERT_TRUE(prompt.ok()) << prompt.status();
  EXPECT_THAT(prompt->tokens, ElementsAre(256, 65, 255));
  EXPECT_EQ(prompt->domain, "prose");
  EXPECT_EQ(prompt->FileName(), "prose.one.safetensors");
  EXPECT_THAT(ParseCalibrationPrompt("a/b.txt", "A", -1)->tokens, ElementsAre(65));
}

TEST(CalibrationPrompt, AJsonFileIsAListOfIdsOrSaysMore) {
  const auto list = ParseCalibrationPrompt("x/prose/one.json", "[3, 1, 4]", 256);
  ASSERT_TRUE(list.ok()) << list.status();
  EXPECT_THAT(list->tokens, ElementsAre(3, 1, 4));
  EXPECT_EQ(list->domain, "prose");
  const auto object = ParseCalibrationPrompt(
      "x/prose/one.json", R"({"token_ids": [3], "domain": "code", "source": "z"})", 256);
  ASSERT_TRUE(object.ok()) << object.status();
  EXPECT_THAT(object->tokens, ElementsAre(3));
  EXPECT_EQ(object->domain, "code");
  for (const char* wrong : {"3", "[-1]", "[1.5]", "[4294967296]", "{}", R"({"token_ids": 3})",
                            R"({"token_ids": [3], "domain": 4})", "[1"}) {
    const absl::Status status = ParseCalibrationPrompt("x/one.json", wrong, 256).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << wrong;
    EXPECT_THAT(std::string(status.message()), HasSubstr("x/one.json: ")) << wrong;
  }
}

class CalibrationPromptsTest : public testing::Test {
 protected:
  CalibrationPromptsTest() {
    model_.vocab_size = 300;
    model_.max_positions = 8;
    model_.byte_tokens = true;
  }
  void Write(const std::string& name, const std::string& content) {
    std::filesystem::create_directories(
        std::filesystem::path(folder_.path() + "/" + name).parent_path());
    std::ofstream(folder_.path() + "/" + name) << content;
  }
  absl::StatusOr<std::vector<CalibrationPrompt>> Read(const std::string& name = "") {
    return ReadCalibrationPrompts({folder_.path() + "/" + name}, 256, model_);
  }
  std::string Refusal(const std::string& name = "") {
    return std::string(Read(name).status().message());
  }

  TemporaryFolder folder_;
  ModelConfig model_;
};

TEST_F(CalibrationPromptsTest, ATextNeedsAModelWhoseTokensAreBytes) {
  Write("prose/a.txt", "a");
  EXPECT_TRUE(Read().ok());
  model_.byte_tokens = false;
  EXPECT_THAT(Refusal(),
              HasSubstr("a.txt: a text becomes bytes, and the tokens of this model are no"));
  Write("ids/a.json", "[7]");
  EXPECT_TRUE(Read("ids").ok());
}

TEST_F(CalibrationPromptsTest, AFolderStandsForItsPromptsInOrder) {
  Write("prose/b.txt", "b");
  Write("code/a.json", "[7]");
  Write("code/notes.md", "not a prompt");
  const auto prompts = Read();
  ASSERT_TRUE(prompts.ok()) << prompts.status();
  ASSERT_EQ(prompts->size(), 2u);
  EXPECT_EQ((*prompts)[0].FileName(), "code.a.safetensors");
  EXPECT_EQ((*prompts)[1].FileName(), "prose.b.safetensors");
}

TEST_F(CalibrationPromptsTest, RefusesWhatTheModelCannotRead) {
  EXPECT_THAT(Refusal("none"), HasSubstr("none: no such file"));
  EXPECT_THAT(Refusal(), HasSubstr("no .json or .txt files"));
  Write("a/long.txt", "123456789");
  EXPECT_THAT(Refusal("a"), HasSubstr("long.txt: 10 tokens are outside [1, 8]"));
  Write("b/empty.json", "[]");
  EXPECT_THAT(Refusal("b"), HasSubstr("empty.json: 0 tokens are outside [1, 8]"));
  Write("c/word.json", "[299, 300]");
  EXPECT_THAT(Refusal("c"), HasSubstr("token_ids[1] 300 is outside the vocabulary of 300"));
  Write("d/x/a.txt", "a");
  Write("d/y/x/a.txt", "b");
  EXPECT_THAT(Refusal("d"), HasSubstr("a second prompt 'a' of domain 'x'"));
  Write("e/a.json", R"({"token_ids": [1], "domain": "../up"})");
  EXPECT_THAT(Refusal("e"), HasSubstr("domain '../up' cannot be part of a file name"));
  Write("f/a.bin", "a");
  EXPECT_THAT(Refusal("f/a.bin"), HasSubstr("a prompt ends in .json or .txt"));
}

}  // namespace
}  // namespace prefilld::model
