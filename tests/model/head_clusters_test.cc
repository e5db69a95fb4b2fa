#include "model/sparse/head_clusters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr int kNone = HeadClusters::kNoCluster;

class HeadClustersTest : public testing::Test {
 protected:
  HeadClustersTest() {
    config_.num_layers = 2;
    config_.num_heads = 3;
  }

  absl::StatusOr<HeadClusters> Load(const std::string& json) {
    folder_.Write("clusters.json", json);
    return LoadHeadClusters(folder_.path() + "/clusters.json", config_);
  }
  std::string Refusal(const std::string& json) {
    const absl::Status status = Load(json).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    return std::string(status.message());
  }

  ModelConfig config_;
  TemporaryFolder folder_;
};

TEST_F(HeadClustersTest, NumbersTheClustersThatShareAndLeavesOutTheOthers) {
  const auto clusters = Load(R"({
    "clusters": {"42": [[0, 0], [1, 2]], "7": [[0, 1]], "9": [[1, 0], [1, 1]]},
    "shared_clusters": ["9", "42"]})");
  ASSERT_TRUE(clusters.ok()) << clusters.status();
  EXPECT_EQ(clusters->num_clusters, 2);
  EXPECT_THAT(clusters->cluster_of,
              ElementsAre(ElementsAre(1, kNone, kNone), ElementsAre(0, 0, 1)));
  EXPECT_FALSE(clusters->thresholds.gamma || clusters->thresholds.vertical_slash_gamma ||
               clusters->thresholds.tau || clusters->thresholds.delta ||
               clusters->thresholds.coverage);
}

TEST_F(HeadClustersTest, ReadsTheThresholdsThatAreThere) {
  const auto clusters = Load(R"({"clusters": {}, "shared_clusters": [],
    "thresholds": {"gamma": 0.95, "vertical_slash_gamma": 0.5, "coverage": 0.5,
                   "min_budget_tokens": 16},
    "model": "somewhere/something"})");
  ASSERT_TRUE(clusters.ok()) << clusters.status();
  EXPECT_TRUE(clusters->empty());
  EXPECT_EQ(clusters->thresholds.gamma, 0.95f);
  EXPECT_EQ(clusters->thresholds.vertical_slash_gamma, 0.5f);
  EXPECT_EQ(clusters->thresholds.coverage, 0.5f);
  EXPECT_EQ(clusters->thresholds.min_budget_tokens, 16);
  EXPECT_FALSE(clusters->thresholds.tau || clusters->thresholds.delta);
}

TEST_F(HeadClustersTest, ReadsWhatCalibrationByLossPromisesAndForWhichPrompts) {
  const std::string plain = R"({"clusters": {}, "shared_clusters": [])";
  EXPECT_FALSE(Load(plain + "}")->calibrated_loss.has_value());
  const auto masses = Load(plain + R"(, "calibration": {"recall": 0.9, "tokens": [4096]}})");
  ASSERT_TRUE(masses.ok()) << masses.status();
  EXPECT_FALSE(masses->calibrated_loss.has_value()) << "it promises no loss";

  const std::string measured =
      R"("measured": {"prompts": 6, "perplexity_rise": 0.008, "standard_error": 0.001,
                      "worst_prompt": 0.02, "density": 0.3}})";
  const auto loss = Load(plain + R"(, "calibration": {"max_perplexity_rise": 0.01,
      "shortest_tokens": 4000, "longest_tokens": 4096, "device": "cpu", )" +
                         measured + "}");
  ASSERT_TRUE(loss.ok()) << loss.status();
  ASSERT_TRUE(loss->calibrated_loss.has_value());
  EXPECT_EQ(loss->calibrated_loss->max_perplexity_rise, 0.01);
  EXPECT_EQ(loss->calibrated_loss->perplexity_rise, 0.008);
  EXPECT_EQ(loss->calibrated_loss->standard_error, 0.001);
  EXPECT_EQ(loss->calibrated_loss->worst_prompt, 0.02);
  EXPECT_EQ(loss->calibrated_loss->density, 0.3);
  EXPECT_EQ(loss->calibrated_loss->prompts, 6);
  EXPECT_EQ(loss->calibrated_loss->shortest_tokens, 4000);
  EXPECT_EQ(loss->calibrated_loss->longest_tokens, 4096);
  EXPECT_EQ(loss->calibrated_loss->max_tokens(), 5120);

  EXPECT_THAT(
      Refusal(plain + R"(, "calibration": {"max_perplexity_rise": 0.01, )" + measured + "}"),
      HasSubstr("calibration.shortest_tokens"));
  EXPECT_THAT(Refusal(plain + R"(, "calibration": {"max_perplexity_rise": 0.01,
                  "shortest_tokens": 4000, "longest_tokens": 4096}})"),
              HasSubstr("calibration.measured.perplexity_rise"));
}

TEST_F(HeadClustersTest, ReadsEachThresholdThatAClusterFileMayNameAndRefusesTheOthers) {
  for (const AttentionThreshold& threshold : kAttentionThresholds) {
    SCOPED_TRACE(threshold.name);
    const auto file = [&](const char* value) {
      return absl::StrCat(R"({"clusters": {}, "shared_clusters": [], "thresholds": {")",
                          threshold.name, "\": ", value, "}}");
    };
    if ((threshold.setters & kClusterFile) == 0) {
      EXPECT_THAT(Refusal(file("1")),
                  HasSubstr(absl::StrCat("thresholds.", threshold.name, " 1 unsupported")));
      continue;
    }
    std::visit(
        [&](const auto& members) {
          // 1 is within the limits of every threshold but score_stride.
          const int value = members.Contains(1) ? 1 : static_cast<int>(members.highest);
          const auto clusters = Load(file(absl::StrCat(value).c_str()));
          ASSERT_TRUE(clusters.ok()) << clusters.status();
          EXPECT_EQ(clusters->thresholds.*members.named, value);
          const std::string refusal = Refusal(file("-1"));
          EXPECT_THAT(refusal,
                      HasSubstr(absl::StrCat("thresholds.", threshold.name, " -1 is not ")));
          EXPECT_THAT(refusal,
                      HasSubstr(absl::StrCat("in [", members.lowest, ", ", members.highest)));
        },
        threshold.members);
  }
}

TEST_F(HeadClustersTest, ReadsHowEachClusterShares) {
  const auto file = [](const std::string& sharing) {
    return R"({"clusters": {"a": [[0, 0]], "b": [[0, 1]], "c": [[1, 0]]},
               "shared_clusters": ["b", "a"], "sharing": )" +
           sharing + "}";
  };
  const auto plain = Load(file("{}"));
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_EQ(plain->num_clusters, 2);
  EXPECT_EQ(plain->FormOf(0), SharingForm::kExact);

  const auto scored = Load(file(R"({"a": "scored", "b": "exact", "c": "none"})"));
  ASSERT_TRUE(scored.ok()) << scored.status();
  EXPECT_EQ(scored->FormOf(scored->cluster_of[0][0]), SharingForm::kScored);
  EXPECT_EQ(scored->FormOf(scored->cluster_of[0][1]), SharingForm::kExact);

  const auto none = Load(file(R"({"b": "none"})"));
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->num_clusters, 1);
  EXPECT_EQ(none->cluster_of[0][1], HeadClusters::kNoCluster);
  EXPECT_EQ(none->cluster_of[0][0], 0);

  EXPECT_THAT(Refusal(file(R"({"a": "half"})")),
              HasSubstr(R"(sharing of cluster "a" is "half", none of exact, scored, none)"));
  EXPECT_THAT(Refusal(file(R"({"c": "scored"})")),
              HasSubstr(R"(sharing names "c", which is not among the shared clusters)"));
  EXPECT_THAT(Refusal(file(R"({"d": "none"})")), HasSubstr(R"(sharing names "d")"));
  EXPECT_THAT(Refusal(file("[]")), HasSubstr("sharing is not an object"));
}

TEST_F(HeadClustersTest, RefusesAFormatItDoesNotKnow) {
  EXPECT_TRUE(Load(R"({"format_version": 1, "clusters": {}, "shared_clusters": []})").ok());
  EXPECT_THAT(Refusal(R"({"format_version": 2, "clusters": {}, "shared_clusters": []})"),
              HasSubstr("format_version 2 unsupported; built for 1"));
  EXPECT_THAT(Refusal(R"({"format_version": "1", "clusters": {}, "shared_clusters": []})"),
              HasSubstr("format_version \"1\" is not"));
}

TEST_F(HeadClustersTest, IsForTheModelItNames) {
  const std::string ours(32, 'a'), other(32, 'b');
  const auto named =
      Load(R"({"model_fingerprint": ")" + ours + R"(", "clusters": {}, "shared_clusters": []})");
  ASSERT_TRUE(named.ok()) << named.status();
  EXPECT_TRUE(CheckMadeFor(*named, ours).ok());
  const absl::Status mismatch = CheckMadeFor(*named, other);
  EXPECT_EQ(mismatch.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(mismatch.message()), HasSubstr(ours));
  EXPECT_THAT(std::string(mismatch.message()), HasSubstr(other));

  const auto unnamed = Load(R"({"clusters": {}, "shared_clusters": []})");
  ASSERT_TRUE(unnamed.ok());
  EXPECT_TRUE(CheckMadeFor(*unnamed, other).ok());
  EXPECT_THAT(Refusal(R"({"model_fingerprint": "3", "clusters": {}, "shared_clusters": []})"),
              HasSubstr("model_fingerprint \"3\" is not 32 lower-case hexadecimal digits"));
}

// The release writes such a file for a model of 32 layers of 32 heads: clusters out of order and
// named by numbers from 1, some with one head, one shared.
TEST_F(HeadClustersTest, ReadsAFileOfTheShapeThatTheReleaseHas) {
  constexpr int kLayers = 32, kHeads = 32, kClusters = 44, kShared = 17;
  config_.num_layers = kLayers;
  config_.num_heads = kHeads;
  const auto cluster_of = [](int head) { return 1 + head * 7919 % (2 * kClusters) % kClusters; };
  std::map<int, std::vector<std::string>, std::greater<int>> heads_of;
  for (int head = 0; head < kLayers * kHeads; ++head) {
    heads_of[cluster_of(head)].push_back(
        absl::StrCat("[", head / kHeads, ", ", head % kHeads, "]"));
  }
  std::vector<std::string> entries;
  for (const auto& [id, heads] : heads_of) {
    entries.push_back(absl::StrCat("\"", id, "\": [", absl::StrJoin(heads, ", "), "]"));
  }
  const std::string file = absl::StrCat("{\"clusters\": {", absl::StrJoin(entries, ", "),
                                        "}, \"shared_clusters\": [\"", kShared, "\"]}");
  const auto clusters = Load(file);
  ASSERT_TRUE(clusters.ok()) << clusters.status();
  EXPECT_EQ(clusters->num_clusters, 1);
  for (int head = 0; head < kLayers * kHeads; ++head) {
    EXPECT_EQ(clusters->cluster_of[head / kHeads][head % kHeads],
              cluster_of(head) == kShared ? 0 : kNone);
  }

  config_.num_heads = 28;  // another model's shape
  EXPECT_THAT(Refusal(file), HasSubstr("of a model with 32 layers of 28 heads"));
}

TEST_F(HeadClustersTest, RefusesHeadsOutsideTheModel) {
  for (const char* head : {"[2, 0]", "[0, 3]", "[-1, 0]", "[0]", "[0, 0, 0]", "[0.0, 1]", "0",
                           "[18446744073709551615, 0]"}) {
    EXPECT_THAT(
        Refusal(std::string(R"({"clusters": {"a": [)") + head + R"(]}, "shared_clusters": []})"),
        HasSubstr("is not a [layer, head] of a model with 2 layers of 3 heads"))
        << head;
  }
}

TEST_F(HeadClustersTest, RefusesContradictions) {
  EXPECT_THAT(Refusal(R"({"clusters": {"a": [[0, 0]], "b": [[0, 0]]}, "shared_clusters": []})"),
              HasSubstr("cluster \"b\": [0,0] is already in a cluster"));
  EXPECT_THAT(Refusal(R"({"clusters": {"a": []}, "shared_clusters": ["b"]})"),
              HasSubstr("shared_clusters names \"b\", which is not among the clusters"));
  EXPECT_THAT(Refusal(R"({"clusters": {"a": []}, "shared_clusters": ["a", "a"]})"),
              HasSubstr("names \"a\" twice"));
}

TEST_F(HeadClustersTest, RefusesMalformedFiles) {
  EXPECT_THAT(Refusal("{"), HasSubstr("not JSON"));
  EXPECT_THAT(Refusal("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(Refusal(R"({"shared_clusters": []})"), HasSubstr("clusters is missing"));
  EXPECT_THAT(Refusal(R"({"clusters": {}})"), HasSubstr("shared_clusters is missing"));
  EXPECT_THAT(Refusal(R"({"clusters": {"a": 1}, "shared_clusters": []})"),
              HasSubstr("cluster \"a\" is not an array"));
  EXPECT_THAT(Refusal(R"({"clusters": {}, "shared_clusters": [], "thresholds": {"tau": 1.5}})"),
              HasSubstr("thresholds.tau 1.5 is not a number in [0, 1]"));
  EXPECT_THAT(Refusal(R"({"clusters": {}, "shared_clusters": [], "thresholds": {"gamma": 0}})"),
              HasSubstr("thresholds.gamma 0 is not in (0, 1]"));
  EXPECT_THAT(Refusal(R"({"clusters": {}, "shared_clusters": [],
                          "thresholds": {"vertical_slash_gamma": 0}})"),
              HasSubstr("thresholds.vertical_slash_gamma 0 is not in (0, 1]"));
  EXPECT_THAT(Refusal(R"({"clusters": {}, "shared_clusters": [],
                          "thresholds": {"min_budget_tokens": -1}})"),
              HasSubstr("thresholds.min_budget_tokens -1 is not an integer in [0, "));
  EXPECT_THAT(Refusal(R"({"clusters": {}, "shared_clusters": [], "thresholds": {"gama": 1}})"),
              HasSubstr("thresholds.gama 1 unsupported"));
}

TEST_F(HeadClustersTest, SaysWhenThereIsNoFile) {
  EXPECT_EQ(LoadHeadClusters(folder_.path() + "/none.json", config_).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace prefilld::model
