#include "model/head_clusters.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
  EXPECT_FALSE(clusters->gamma || clusters->tau || clusters->delta || clusters->coverage);
}

TEST_F(HeadClustersTest, ReadsTheThresholdsThatAreThere) {
  const auto clusters = Load(R"({"clusters": {}, "shared_clusters": [],
    "thresholds": {"gamma": 0.95, "coverage": 0.5}, "model": "somewhere/something"})");
  ASSERT_TRUE(clusters.ok()) << clusters.status();
  EXPECT_TRUE(clusters->empty());
  EXPECT_EQ(clusters->gamma, 0.95f);
  EXPECT_EQ(clusters->coverage, 0.5f);
  EXPECT_FALSE(clusters->tau || clusters->delta);
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
  EXPECT_THAT(Refusal(R"({"clusters": {}, "shared_clusters": [], "thresholds": {"gama": 1}})"),
              HasSubstr("thresholds.gama 1 unsupported"));
}

TEST_F(HeadClustersTest, SaysWhenThereIsNoFile) {
  EXPECT_EQ(LoadHeadClusters(folder_.path() + "/none.json", config_).status().code(),
            absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace prefilld::model
