// The heads of a model that attend alike: the offline half of pattern sharing.
//
// The file format (JSON) is that of the SharePrefill release with optional additions:
//   {"clusters": {"<id>": [[layer, head], ...], ...},   groups of query heads
//    "shared_clusters": ["<id>", ...],                  those that may share patterns
//    "sharing": {"<id>": "scored", ...},                optional: how each shares, SharingForm
//    "format_version": 1,                               optional; another one is refused
//    "model_fingerprint": "<32 hexadecimal digits>",    optional; of the model it was made for
//    "thresholds": {"gamma": 0.9, ...}}                 optional, tuned: any threshold that a
//                                                       cluster file may name (attention_options.h)
//    "calibration": {"max_perplexity_rise": 0.01, ...}  optional: what was measured, CalibratedLoss
// Other keys may say where the file comes from and are not read, nor is a calibration that promises
// no loss. model/calibration makes such files.
#ifndef PREFILLD_MODEL_SPARSE_HEAD_CLUSTERS_H_
#define PREFILLD_MODEL_SPARSE_HEAD_CLUSTERS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "model/checkpoint/config.h"
#include "model/sparse/attention_options.h"

namespace prefilld::model {

// How the heads of a cluster share. A cluster for which the file names nothing is exact if it is
// among the shared ones. The file may also name "none", which takes it off them.
enum class SharingForm : uint8_t {
  kExact,   // "exact": the pivot is exact, and its block mass gives the pattern
  kScored,  // "scored": the pivot is a scored head, whose pattern it is; the others are not scored
};

// The loss that the file's thresholds promise, and what was measured on prompts that had no part in
// choosing them. Perplexity rises by this part of that of dense attention.
struct CalibratedLoss {
  double max_perplexity_rise = 0.0;  // promised, in the mean over prompts
  double perplexity_rise = 0.0;      // measured
  double standard_error = 0.0;
  double worst_prompt = 0.0;  // its rise
  double density = 0.0;
  int64_t prompts = 0;
  int64_t shortest_tokens = 0;  // of these prompts
  int64_t longest_tokens = 0;

  // Nothing is promised of prompts that are longer by more than a quarter.
  int64_t max_tokens() const { return longest_tokens + longest_tokens / 4; }
};

struct HeadClusters {
  static constexpr int kNoCluster = -1;

  // Cluster numbers [num_layers][num_heads], 0 .. num_clusters - 1, or kNoCluster for heads in no
  // cluster and for heads of clusters that do not share.
  std::vector<std::vector<int>> cluster_of;
  int num_clusters = 0;                           // shared ones
  std::vector<SharingForm> forms;                 // [num_clusters]; empty: all exact
  AttentionOverrides thresholds;                  // those that the file names
  std::string model_fingerprint;                  // empty: the file does not say
  std::optional<CalibratedLoss> calibrated_loss;  // absent: the file promises none

  bool empty() const { return num_clusters == 0; }
  SharingForm FormOf(int cluster) const {
    return forms.empty() ? SharingForm::kExact : forms[cluster];
  }
};

// Loads and checks a file. INVALID_ARGUMENT: malformed JSON, another format version, a head outside
// the model, a head in two clusters, a shared cluster that does not exist, a form of sharing that
// is unknown or not of a shared cluster, or a promise without what was measured.
absl::StatusOr<HeadClusters> LoadHeadClusters(const std::string& path, const ModelConfig& config);

// Checks that the file was made for the loaded model, because heads are alike or not by their
// weights. FAILED_PRECONDITION names both fingerprints when it was made for another model
// (model/checkpoint/fingerprint.h).
absl::Status CheckMadeFor(const HeadClusters& clusters, const std::string& fingerprint);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_SPARSE_HEAD_CLUSTERS_H_
