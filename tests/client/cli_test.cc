#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "client/cli/progress_line.h"
#include "client/cli/prompt.h"
#include "client/cli/summary.h"
#include "gmock/gmock.h"
#include "google/rpc/retry_info.pb.h"
#include "google/rpc/status.pb.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "proto/wire/grpc_status.h"
#include "proto/wire/tls.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// A folder with a config.json of these fields.
class ModelFolder {
 public:
  explicit ModelFolder(const std::string& config) {
    path_ = (std::filesystem::temp_directory_path() / "prefilld-cli-XXXXXX").string();
    if (mkdtemp(path_.data()) == nullptr) abort();
    Write("config.json", config);
  }
  ~ModelFolder() { std::filesystem::remove_all(path_); }
  void Write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ + "/" + name) << content;
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

TEST(Prompt, ATextForAByteLevelModelIsItsBytesAfterTheBeginningToken) {
  const ModelFolder model(R"({"byte_tokens": true})");
  PromptSource source;
  source.model_dir = model.path();
  source.text = std::string("a\xc3\xa4");
  EXPECT_THAT(ReadPrompt(source)->token_ids, ElementsAre(256, 'a', 0xc3, 0xa4));
  source.bos = -1;
  const auto prompt = ReadPrompt(source);
  EXPECT_THAT(prompt->token_ids, ElementsAre('a', 0xc3, 0xa4));
  EXPECT_EQ(*prompt->text->Decode('x'), "x");
  EXPECT_EQ(*prompt->text->Decode(257), "");
  source.text = std::string("");
  EXPECT_EQ(ReadPrompt(source).status().message(), "the prompt is empty");
}

// Bytes must never go as ids to a model whose tokens are something else.
TEST(Prompt, ATextIsRefusedUnlessTheModelSaysHowItBecomesTokens) {
  PromptSource source;
  source.text = std::string("a");
  const auto refusal = [&] {
    const absl::Status status = ReadPrompt(source).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    return std::string(status.message());
  };
  EXPECT_THAT(refusal(), HasSubstr("a text needs --model=FOLDER"));
  source.model_dir = "/nonexistent";
  EXPECT_THAT(refusal(), HasSubstr("/nonexistent/config.json cannot be read"));
  for (const char* config : {"{}", R"({"vocab_size": 256})", R"({"byte_tokens": false})"}) {
    const ModelFolder model(config);
    source.model_dir = model.path();
    EXPECT_THAT(refusal(), HasSubstr("has no tokenizer.json"));
    model.Write("tokenizer.json", "{}");
    source.python = "/nonexistent/python";
    EXPECT_THAT(refusal(), HasSubstr("--python=/nonexistent/python cannot be run"));
    source.python = "false";
    EXPECT_THAT(refusal(), HasSubstr("pip install './client/python[tokenizer]'"));
  }
}

TEST(Prompt, TheFolderMustBeThatOfTheServedModel) {
  const ModelFolder model(R"({"vocab_size": 264, "num_hidden_layers": 8})");
  EXPECT_TRUE(CheckServedModel(model.path(), 264, 8).ok());
  EXPECT_TRUE(CheckServedModel(model.path(), 0, 0).ok());  // an older server does not say
  const absl::Status vocabulary = CheckServedModel(model.path(), 151936, 8);
  EXPECT_EQ(vocabulary.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(vocabulary.message(), HasSubstr("whose vocab_size is 151936 and not 264"));
  EXPECT_THAT(CheckServedModel(model.path(), 264, 28).message(),
              HasSubstr("whose num_hidden_layers is 28 and not 8"));
}

TEST(Prompt, TokenIdsComeInSeveralForms) {
  EXPECT_THAT(*ParseTokenIds("1, 2 3"), ElementsAre(1, 2, 3));
  EXPECT_THAT(*ParseTokenIds(" [1,2,\n 151643]\n"), ElementsAre(1, 2, 151643));
  EXPECT_THAT(ParseTokenIds("1 -2").status().message(), HasSubstr("'-2' is no token id"));
  EXPECT_THAT(ParseTokenIds("[1 2").status().message(), HasSubstr("no closing bracket"));
  EXPECT_FALSE(ParseTokenIds("4294967296").ok());
}

// make_prompts.py writes the first, and `generate --json` and `prefill --json` objects of such a
// form.
TEST(Prompt, TokenIdsComeInObjectsAsOurToolsWriteThem) {
  EXPECT_THAT(*ParseTokenIds(R"({"domain": "prose", "token_ids": [1, 2, 151643]})"),
              ElementsAre(1, 2, 151643));
  Generated generated;
  generated.tokens.emplace_back().set_token_id(7);
  EXPECT_THAT(*ParseTokenIds(ToJson(generated).dump(2)), ElementsAre(7));
  EXPECT_THAT(ParseTokenIds(R"({"tokens": [1]})").status().message(),
              HasSubstr("the object has no list \"token_ids\""));
  EXPECT_THAT(ParseTokenIds(R"({"token_ids": [1, -2]})").status().message(),
              HasSubstr("'-2' is no token id"));
  EXPECT_THAT(ParseTokenIds(R"({"token_ids": [1)").status().message(), HasSubstr("no list"));
}

TEST(Prompt, AMissingFileIsNamed) {
  PromptSource source;
  source.text_file = std::string("/nonexistent/prompt");
  EXPECT_EQ(ReadPrompt(source).status().message(), "/nonexistent/prompt cannot be read");
}

TEST(Prompt, AFolderIsNoFile) {
  PromptSource source;
  source.text_file = std::string("/");
  EXPECT_EQ(ReadPrompt(source).status().message(), "/ cannot be read");
  EXPECT_EQ(wire::ReadPemFile("TLS ca_file", "/").status().message(),
            "TLS ca_file / cannot be read");
}

TEST(Summary, NumbersReadWell) {
  EXPECT_EQ(CountText(7), "7");
  EXPECT_EQ(CountText(1000), "1,000");
  EXPECT_EQ(CountText(1234567), "1,234,567");
  EXPECT_EQ(BytesText(999), "999 B");
  EXPECT_EQ(BytesText(17'180'000'000), "17.18 GB");
  EXPECT_EQ(DurationText(812'400), "812 ms");
  EXPECT_EQ(DurationText(4'210'000), "4.21 s");
}

TEST(Summary, GivesNoTimesOfACacheThatWentElsewhere) {
  ::prefill::v1::PrefillResult result;
  result.set_kv_bytes(2'000'000);
  result.set_kv_frames(3);
  const std::string summary = Summary(result, TransferTimes());
  EXPECT_THAT(summary, HasSubstr("2.0 MB in 3 frames, pushed\n"));
  EXPECT_EQ(summary.find("0 B/s"), std::string::npos);
}

TEST(Summary, TellsWhatAGenerationDid) {
  Generated generated;
  generated.num_layers = 8;
  auto& result = generated.result;
  result.set_num_tokens(5);
  result.set_ttft_us(500'000);
  result.set_decode_us(40'000);
  result.set_kv_transfer_us(100'000);
  result.set_kv_overlap(0.875);
  result.set_first_frame_us(70'000);
  result.set_layers_computed_at_first_frame(1);
  result.mutable_prefill()->set_num_tokens(8192);
  result.mutable_prefill()->set_policy(::prefill::v1::ATTENTION_POLICY_SHARE);
  result.mutable_prefill()->set_kv_bytes(50'000'000);
  result.mutable_prefill()->mutable_total()->set_density(0.345);
  result.mutable_prefill()->mutable_total()->set_pivot_heads(12);
  const std::string text = Summary(generated);
  EXPECT_THAT(text, HasSubstr("8,192 tokens; first token after 500 ms, 16,384 tokens/s"));
  EXPECT_THAT(text, HasSubstr("share, density 34.5 %; heads: 0 dense, 12 pivot"));
  EXPECT_THAT(text, HasSubstr("50.0 MB in 0 frames within 100 ms (500.0 MB/s)"));
  EXPECT_THAT(text, HasSubstr("88 % left before the last layer was done"));
  EXPECT_THAT(text, HasSubstr("with 1 of 8 layers computed"));
  EXPECT_THAT(text, HasSubstr("5 tokens, 100.0 tokens/s"));
  EXPECT_EQ(ToJson(generated)["prefill"]["density"], 0.345);
}

TEST(Summary, TellsTheRecallThatWasMeasured) {
  ::prefill::v1::PrefillResult result;
  EXPECT_EQ(Summary(result, TransferTimes()).find("recall"), std::string::npos);
  auto& shared = *result.mutable_total()->mutable_recall()->mutable_shared();
  shared.set_mean(0.9125);
  shared.set_fifth_percentile(0.85);
  shared.set_lowest(0.8);
  shared.set_lowest_layer(5);
  shared.set_lowest_head(2);
  shared.add_heads(0.8f);
  *result.add_layers() = result.total();
  const std::string text = Summary(result, TransferTimes());
  EXPECT_THAT(text, HasSubstr("shared: mean 0.912, 5th percentile 0.850, lowest 0.800 (layer 5, "
                              "head 2)"));
  EXPECT_EQ(text.find("baseline"), std::string::npos);
  EXPECT_THAT(text, HasSubstr("lowest recall"));
  const nlohmann::json json = ToJson(result, TransferTimes());
  EXPECT_EQ(json["prefill"]["recall"]["shared"]["lowest_layer"], 5);
  EXPECT_FALSE(json["prefill"]["recall"].contains("baseline"));
}

TEST(Summary, TellsHowLikelyThePromptIs) {
  ::prefill::v1::PrefillResult result;
  EXPECT_EQ(Summary(result, TransferTimes()).find("perplexity"), std::string::npos);
  for (const float logprob : {-1.0f, -2.0f, -3.0f, -6.0f}) {
    result.add_prompt_logprobs(logprob);
    result.add_best_logprobs(-1.0f);
  }
  EXPECT_THAT(Summary(result, TransferTimes()),
              HasSubstr("perplexity 20.09 over 4 tokens; 25.0 % are the likeliest"));
  result.set_logprobs_us(1234);
  EXPECT_EQ(ToJson(result, TransferTimes())["prefill"]["logprobs_us"], 1234);
}

TEST(Summary, AnErrorIsOneLineWithItsStatusAndWhenToComeBack) {
  google::rpc::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(2);
  google::rpc::Status details;
  details.add_details()->PackFrom(retry);
  const absl::Status full = wire::FromGrpc(grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED,
                                                        "queue full", details.SerializeAsString()));
  EXPECT_EQ(ErrorText(full, "host:1"), "RESOURCE_EXHAUSTED: queue full; try again in 2s");
  EXPECT_EQ(ErrorText(absl::UnavailableError("gone"), "host:1"), "UNAVAILABLE: gone (host:1)");
}

TEST(ProgressLine, TellsQueueAndLayers) {
  ::prefill::v1::Progress progress;
  progress.set_queue_position(3);
  EXPECT_EQ(ProgressText(progress, 0), "queued behind 3");
  progress.set_queue_position(0);
  progress.set_layers_computed(12);
  progress.set_num_layers(32);
  progress.set_elapsed_us(4'200'000);
  EXPECT_EQ(ProgressText(progress, 1'100'000'000), "layer 12 of 32, 4.2 s, 1.10 GB of KV");
}

}  // namespace
}  // namespace prefilld::client
