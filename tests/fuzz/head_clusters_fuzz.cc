// Fuzzes cluster files as an operator might give them. One that is accepted names only heads of the
// model.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "model/sparse/head_clusters.h"
#include "tests/fuzz/require.h"
#include "tests/model/temporary_folder.h"

namespace prefilld::model {
namespace {

using fuzz::Require;

constexpr int kLayers = 8;
constexpr int kHeads = 8;

void CheckClusters(const HeadClusters& clusters) {
  Require(clusters.num_clusters >= 0, "there are no fewer clusters than none");
  Require(clusters.cluster_of.size() == kLayers, "every layer has its heads");
  for (const auto& layer : clusters.cluster_of) {
    Require(layer.size() == kHeads, "every head is somewhere");
    for (const int cluster : layer) {
      Require(cluster >= HeadClusters::kNoCluster && cluster < clusters.num_clusters,
              "a head is in a cluster that shares or in none");
    }
  }
  Require(Validate(Apply(clusters.thresholds, AttentionOptions())).ok(), "thresholds are in range");
}

}  // namespace
}  // namespace prefilld::model

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace prefilld::model;
  static const TemporaryFolder folder;
  folder.Write("head_clusters.json", absl::string_view(reinterpret_cast<const char*>(data), size));
  ModelConfig config;
  config.num_layers = kLayers;
  config.num_heads = kHeads;
  const auto clusters = LoadHeadClusters(folder.path() + "/head_clusters.json", config);
  if (clusters.ok()) CheckClusters(*clusters);
  return 0;
}
