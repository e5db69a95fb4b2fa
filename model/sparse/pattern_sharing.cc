#include "model/sparse/pattern_sharing.h"

#include <algorithm>
#include <bit>

#include "model/device/stopwatch.h"
#include "model/sparse/attention_parts.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

// The points on the device's time line.
enum Mark {
  kBegin,
  kEstimated,
  kSelected,
  kPivotsBegin,
  kPivotsAttended,
  kDecided,
  kAttentionBegins,
  kAttended,
  kNumPoints
};
static_assert(kNumPoints == PatternSharing::kNumMarks);

// Counts the blocks of `row` that are not in `old`.
int64_t CountNewBlocks(absl::Span<const uint32_t> row, absl::Span<const uint32_t> old) {
  int64_t count = 0;
  for (size_t w = 0; w < row.size(); ++w) count += std::popcount(row[w] & ~old[w]);
  return count;
}

// The origin of the pattern of a head that is no pivot.
PatternSource SourceOf(HeadRole role) {
  if (role == HeadRole::kShared || role == HeadRole::kScoreSharing) return PatternSource::kPivot;
  return role == HeadRole::kScored ? PatternSource::kScored : PatternSource::kVerticalSlash;
}

}  // namespace

absl::StatusOr<std::unique_ptr<PatternSharing>> PatternSharing::Create(SharingWorkspace* workspace,
                                                                       int64_t max_tokens) {
  std::unique_ptr<PatternSharing> sharing(new PatternSharing(workspace));
  PREFILLD_RETURN_IF_ERROR(sharing->Allocate(max_tokens));
  return sharing;
}

absl::Status PatternSharing::Allocate(int64_t max_tokens) {
  const int64_t heads = config_.num_heads;
  const int64_t clusters = scratch_.clusters.num_clusters;
  const int64_t blocks = kernels::CeilDiv(max_tokens, scratch_.block_tokens);
  const int64_t words = kernels::PatternWords(blocks);
  if (clusters > 0) {
    PREFILLD_ASSIGN_OR_RETURN(pivot_patterns_,
                              device_.Allocate(clusters * blocks * words * sizeof(uint32_t)));
  }
  pivots_.resize(clusters);
  for (ClusterPivot& pivot : pivots_) {
    pivot.estimate.reserve(blocks);
    pivot.last_row.reserve(words);
  }
  no_clusters_.assign(heads, HeadClusters::kNoCluster);
  roles_.resize(heads);
  to_score_.reserve(heads);
  work_.reserve(heads);
  return absl::OkStatus();
}

void PatternSharing::StartPrompt(int64_t num_tokens, const AttentionOptions& options) {
  options_ = options;
  num_blocks_ = kernels::CeilDiv(num_tokens, scratch_.block_tokens);
  for (ClusterPivot& pivot : pivots_) pivot.layer = pivot.head = ClusterPivot::kNone;
}

int64_t PatternSharing::CausalBlocks() const {
  const int64_t first = num_blocks_ - num_query_blocks_;
  return (num_blocks_ * (num_blocks_ + 1) - first * (first + 1)) / 2;
}

absl::Status PatternSharing::Attend(int layer, const kernels::AttentionParams& attention,
                                    LayerReport* report) {
  cluster_of_ = options_.policy == AttentionPolicy::kShare
                    ? absl::MakeConstSpan(scratch_.clusters.cluster_of[layer])
                    : absl::MakeConstSpan(no_clusters_);
  may_share_ = options_.coverage > 0.0f &&
               std::any_of(cluster_of_.begin(), cluster_of_.end(), [this](int cluster) {
                 return cluster != HeadClusters::kNoCluster &&
                        (!pivots_[cluster].exists() || pivots_[cluster].worth_sharing);
               });
  num_query_blocks_ =
      num_blocks_ - (attention.num_keys - attention.num_queries) / scratch_.block_tokens;
  stages_ = {};
  std::fill(
      roles_.begin(), roles_.end(),
      options_.policy == AttentionPolicy::kShare ? HeadRole::kScored : HeadRole::kVerticalSlash);
  // If nobody asked for the report of an earlier layer, its downloads still read what is written
  // next.
  PREFILLD_RETURN_IF_ERROR(device_.FinishDownloads());
  PREFILLD_RETURN_IF_ERROR(Prepare(layer, attention));
  if (may_share_) {
    PREFILLD_RETURN_IF_ERROR(Decide(layer, attention));
    PREFILLD_RETURN_IF_ERROR(ScoreHeads(layer, attention, /*can_share=*/true));
  }
  AssignWork(layer);
  PREFILLD_RETURN_IF_ERROR(device_.Mark(kDecided));
  PREFILLD_RETURN_IF_ERROR(AttendSparse(layer, attention, report));
  return DownloadForReport(layer);
}

absl::Status PatternSharing::Prepare(int layer, const kernels::AttentionParams& attention) {
  PREFILLD_RETURN_IF_ERROR(device_.Mark(kBegin));
  PREFILLD_RETURN_IF_ERROR(scratch_.head_estimate->OfLastQueries(attention));
  // The host decides by the estimate while the device goes on to the sets.
  if (may_share_) {
    PREFILLD_RETURN_IF_ERROR(device_.StartDownload(
        scratch_.block_mass_host.data(), scratch_.head_estimate->block_mass().data(),
        config_.num_heads * num_blocks_ * sizeof(float)));
  }
  PREFILLD_RETURN_IF_ERROR(device_.Mark(kEstimated));
  PREFILLD_RETURN_IF_ERROR(SelectSets(layer, attention));
  return device_.Mark(kSelected);
}

// Selects sets for all heads, whatever they will turn out to do. One launch is cheaper than
// choosing heads, and the device would have to wait for the host's decisions. Scores cost more, so
// heads that may share are scored only once they do not.
absl::Status PatternSharing::SelectSets(int layer, const kernels::AttentionParams& attention) {
  const bool share = options_.policy == AttentionPolicy::kShare;
  PREFILLD_RETURN_IF_ERROR(scratch_.head_estimate->BuildVerticalSlash(
      share ? options_.last_rows_gamma : options_.gamma_of_vertical_slash(),
      options_.min_budget_tokens, OwnPattern(0),
      scratch_.figures.as<int64_t>() + scratch_.OwnBlocksSlot(0)));
  if (may_share_) {
    // These are each head's own blocks of the last row, in case it shares.
    PREFILLD_RETURN_IF_ERROR(
        device_.ops().SelectRows({.block_mass = scratch_.head_estimate->block_mass().as<float>(),
                                  .num_query_blocks = 1,
                                  .num_key_blocks = num_blocks_,
                                  .gamma = options_.gamma,
                                  .pattern = scratch_.last_rows.as<uint32_t>(),
                                  .num_heads = config_.num_heads}));
  }
  return share ? ScoreHeads(layer, attention, /*can_share=*/false) : absl::OkStatus();
}

absl::Status PatternSharing::ScoreHeads(int layer, const kernels::AttentionParams& attention,
                                        bool can_share) {
  to_score_.clear();
  for (int head = 0; head < config_.num_heads; ++head) {
    const bool could_share = may_share_ && cluster_of_[head] != HeadClusters::kNoCluster;
    if (roles_[head] != HeadRole::kScored || could_share != can_share) continue;
    uint32_t* pattern = OwnPattern(head);
    if (could_share && IsScoredPivot(head, layer)) {
      // Its pattern outlives the layer, so it is built where it stays.
      pattern = PivotPattern(cluster_of_[head]);
      PREFILLD_RETURN_IF_ERROR(scratch_.head_estimate->BuildVerticalSlashOf(
          head, options_.last_rows_gamma, options_.min_budget_tokens, pattern));
    }
    to_score_.push_back({head, pattern});
  }
  return AddScoredBlocks(scratch_, attention, to_score_, options_);
}

absl::Status PatternSharing::Decide(int layer, const kernels::AttentionParams& attention) {
  PREFILLD_RETURN_IF_ERROR(device_.FinishDownloads());
  Stopwatch stopwatch;
  const absl::Span<const float> estimate(scratch_.block_mass_host.as<float>(),
                                         config_.num_heads * num_blocks_);
  std::vector<int> pivots = ChoosePivots(cluster_of_, estimate, pivots_, options_);
  const auto scored = std::stable_partition(pivots.begin(), pivots.end(), [this](int head) {
    return scratch_.clusters.FormOf(cluster_of_[head]) == SharingForm::kExact;
  });
  KeepScoredPivots(layer, absl::MakeConstSpan(pivots).subspan(scored - pivots.begin()));
  pivots.erase(scored, pivots.end());
  stages_.host_us += static_cast<double>(stopwatch.LapUs());

  const int between_pauses = HeadsBetweenPauses(device_.traits(), attention);
  const auto at_a_time = static_cast<size_t>(
      std::min<int64_t>(between_pauses, scratch_.MassesAtATime(num_query_blocks_, num_blocks_)));
  for (size_t first = 0; first < pivots.size(); first += at_a_time) {
    const auto batch = absl::MakeConstSpan(pivots).subspan(first, at_a_time);
    PREFILLD_RETURN_IF_ERROR(AttendPivots(attention, batch));
    PREFILLD_RETURN_IF_ERROR(MeasurePivots(batch));
    KeepPivots(layer, batch);
    if (between_pauses < config_.num_heads) {
      PREFILLD_RETURN_IF_ERROR(scratch_.Pause(LayerStage::kPatterns));
    }
  }

  stopwatch.LapUs();
  for (int head = 0; head < config_.num_heads; ++head) {
    const int cluster = cluster_of_[head];
    if (std::binary_search(pivots.begin(), pivots.end(), head)) {
      roles_[head] = HeadRole::kPivot;
    } else if (cluster != HeadClusters::kNoCluster && !IsScoredPivot(head, layer)) {
      roles_[head] = DecideHead(layer, EstimateOf(head), &pivots_[cluster], options_);
    }
  }
  stages_.host_us += static_cast<double>(stopwatch.LapUs());
  return absl::OkStatus();
}

absl::Status PatternSharing::AttendPivots(const kernels::AttentionParams& attention,
                                          absl::Span<const int> pivots) {
  work_.clear();
  for (size_t i = 0; i < pivots.size(); ++i) {
    work_.push_back({.head = pivots[i], .block_mass = PivotMass(i)});
  }
  AttentionParts parts(device_.traits(), scratch_.pauses, attention, work_);
  PREFILLD_RETURN_IF_ERROR(device_.Mark(kPivotsBegin));
  while (parts.Next()) {
    PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(parts.params()));
    // The pause behind the last part comes when the pivots are measured.
    if (!parts.is_last()) PREFILLD_RETURN_IF_ERROR(scratch_.Pause(LayerStage::kAttention));
  }
  return device_.Mark(kPivotsAttended);
}

// Figures of slot 2 i are those of pivot i's pattern, of slot 2 i + 1 those of its own
// vertical-slash set.
absl::Status PatternSharing::MeasurePivots(absl::Span<const int> pivots) {
  const int64_t words = row_words();
  for (size_t i = 0; i < pivots.size(); ++i) {
    const int slot = static_cast<int>(2 * i);
    uint32_t* pattern = PivotPattern(cluster_of_[pivots[i]]);
    PREFILLD_RETURN_IF_ERROR(device_.ops().SelectRows({.block_mass = PivotMass(i),
                                                       .num_query_blocks = num_query_blocks_,
                                                       .num_key_blocks = num_blocks_,
                                                       .gamma = options_.gamma,
                                                       .pattern = pattern}));
    PREFILLD_RETURN_IF_ERROR(Measure(PivotMass(i), pattern, slot));
    auto* vertical_slash = scratch_.pivot_vertical_slash.as<uint32_t>();
    PREFILLD_RETURN_IF_ERROR(scratch_.head_estimate->BuildVerticalSlashOf(
        pivots[i], options_.gamma_of_vertical_slash(), options_.min_budget_tokens, vertical_slash));
    PREFILLD_RETURN_IF_ERROR(Measure(PivotMass(i), vertical_slash, slot + 1));
    PREFILLD_RETURN_IF_ERROR(
        device_.StartDownload(scratch_.last_rows_host.as<uint32_t>() + i * words,
                              pattern + (num_query_blocks_ - 1) * words, words * sizeof(uint32_t)));
  }
  PREFILLD_RETURN_IF_ERROR(DownloadFigures());
  PREFILLD_RETURN_IF_ERROR(device_.FinishDownloads());
  PREFILLD_ASSIGN_OR_RETURN(const double attention_us,
                            device_.ElapsedUs(kPivotsBegin, kPivotsAttended));
  stages_.pivots_us += attention_us;
  return absl::OkStatus();
}

void PatternSharing::KeepPivots(int layer, absl::Span<const int> pivots) {
  for (size_t i = 0; i < pivots.size(); ++i) {
    const int slot = static_cast<int>(2 * i);
    const absl::Span<const float> estimate = EstimateOf(pivots[i]);
    const absl::Span<const uint32_t> last_row = HostLastRow(static_cast<int>(i));
    ClusterPivot& pivot = pivots_[cluster_of_[pivots[i]]];
    pivot.layer = layer;
    pivot.head = pivots[i];
    pivot.estimate.assign(estimate.begin(), estimate.end());
    pivot.scored = false;
    pivot.worth_sharing = WorthSharing(Figures(slot), Figures(slot + 1), options_.coverage);
    pivot.pattern_blocks = Figures(slot).blocks;
    pivot.last_row.assign(last_row.begin(), last_row.end());
  }
}

void PatternSharing::KeepScoredPivots(int layer, absl::Span<const int> pivots) {
  for (const int head : pivots) {
    const absl::Span<const float> estimate = EstimateOf(head);
    ClusterPivot& pivot = pivots_[cluster_of_[head]];
    pivot.layer = layer;
    pivot.head = head;
    pivot.estimate.assign(estimate.begin(), estimate.end());
    pivot.scored = true;
    pivot.worth_sharing = true;
    pivot.pattern_blocks = 0;
    pivot.last_row.assign(static_cast<size_t>(row_words()), 0);
  }
}

void PatternSharing::CompleteScoredPivots(int layer) {
  for (int head = 0; head < config_.num_heads; ++head) {
    if (!IsScoredPivot(head, layer)) continue;
    ClusterPivot& pivot = pivots_[cluster_of_[head]];
    pivot.pattern_blocks = scratch_.figures_host.as<int64_t>()[scratch_.OwnBlocksSlot(head)];
    const uint32_t* row = scratch_.pivot_rows_host.as<uint32_t>() + head * row_words();
    pivot.last_row.assign(row, row + row_words());
  }
}

void PatternSharing::AssignWork(int layer) {
  work_.clear();
  for (int head = 0; head < config_.num_heads; ++head) {
    switch (roles_[head]) {
      case HeadRole::kPivot:
        break;
      case HeadRole::kScored:
      case HeadRole::kVerticalSlash:
        work_.push_back({.head = head,
                         .pattern = IsScoredPivot(head, layer) ? PivotPattern(cluster_of_[head])
                                                               : OwnPattern(head)});
        break;
      case HeadRole::kShared:
      case HeadRole::kScoreSharing:
        work_.push_back({.head = head,
                         .pattern = PivotPattern(cluster_of_[head]),
                         .last_row = scratch_.last_rows.as<uint32_t>() + head * row_words()});
        break;
    }
  }
}

absl::Status PatternSharing::AttendSparse(int layer, const kernels::AttentionParams& attention,
                                          LayerReport* report) {
  if (options_.recall_audit_rows > 0 && !work_.empty()) {
    // The audit's time begins when everything before it is done.
    PREFILLD_RETURN_IF_ERROR(device_.Synchronize());
    Stopwatch stopwatch;
    kernels::AttentionParams audited = attention;
    audited.work = work_.data();
    audited.num_work = static_cast<int>(work_.size());
    PREFILLD_RETURN_IF_ERROR(Audit(layer, audited, report));
    report->audit_us = stopwatch.LapUs();
  }
  PREFILLD_RETURN_IF_ERROR(device_.Mark(kAttentionBegins));
  AttentionParts parts(device_.traits(), scratch_.pauses, attention, work_);
  while (parts.Next()) {
    PREFILLD_RETURN_IF_ERROR(device_.ops().Attention(parts.params()));
    if (!parts.is_all()) PREFILLD_RETURN_IF_ERROR(scratch_.Pause(LayerStage::kAttention));
  }
  return device_.Mark(kAttended);
}

absl::Status PatternSharing::Audit(int layer, const kernels::AttentionParams& attention,
                                   LayerReport* report) {
  std::vector<float> recall(attention.num_work);
  // The estimate has been read by now, so the audit may overwrite it.
  PREFILLD_RETURN_IF_ERROR(scratch_.audit->Measure(attention, layer, options_.recall_audit_rows,
                                                   *scratch_.head_estimate,
                                                   absl::MakeSpan(recall)));
  for (int i = 0; i < attention.num_work; ++i) {
    const int head = attention.work[i].head;
    report->recall.push_back({layer, head, SourceOf(roles_[head]), recall[i]});
  }
  return absl::OkStatus();
}

absl::Status PatternSharing::DownloadForReport(int layer) {
  PREFILLD_RETURN_IF_ERROR(DownloadFigures());
  const int64_t last_row = num_query_blocks_ - 1;
  for (int head = 0; head < config_.num_heads; ++head) {
    if (!IsScoredPivot(head, layer)) continue;
    PREFILLD_RETURN_IF_ERROR(
        device_.StartDownload(scratch_.pivot_rows_host.as<uint32_t>() + head * row_words(),
                              PivotPattern(cluster_of_[head]) + last_row * row_words(),
                              static_cast<size_t>(row_words()) * sizeof(uint32_t)));
  }
  if (!may_share_) return absl::OkStatus();
  return device_.StartDownload(scratch_.last_rows_host.data(), scratch_.last_rows.data(),
                               config_.num_heads * row_words() * sizeof(uint32_t));
}

absl::Status PatternSharing::Report(LayerReport* report) {
  PREFILLD_RETURN_IF_ERROR(device_.FinishDownloads());
  PREFILLD_RETURN_IF_ERROR(MeasureTimes(report));
  CompleteScoredPivots(report->layer);
  int64_t blocks = 0;
  for (int head = 0; head < config_.num_heads; ++head) {
    switch (roles_[head]) {
      case HeadRole::kPivot:
        ++report->pivot_heads;
        blocks += CausalBlocks();
        break;
      case HeadRole::kScored:
      case HeadRole::kVerticalSlash:
        ++(roles_[head] == HeadRole::kScored ? report->scored_heads : report->vertical_slash_heads);
        blocks += scratch_.figures_host.as<int64_t>()[scratch_.OwnBlocksSlot(head)];
        break;
      case HeadRole::kShared:
      case HeadRole::kScoreSharing: {
        ++(roles_[head] == HeadRole::kShared ? report->shared_heads : report->score_sharing_heads);
        const ClusterPivot& pivot = pivots_[cluster_of_[head]];
        blocks += pivot.pattern_blocks + CountNewBlocks(HostLastRow(head), pivot.last_row);
        break;
      }
    }
  }
  report->density = static_cast<double>(blocks) /
                    (static_cast<double>(CausalBlocks()) * static_cast<double>(config_.num_heads));
  return absl::OkStatus();
}

absl::Status PatternSharing::MeasureTimes(LayerReport* report) {
  double attention_us = 0.0;
  const struct {
    Mark from, to;
    double& us;
  } stages[] = {{kBegin, kEstimated, stages_.estimate_us},
                {kEstimated, kSelected, stages_.select_us},
                {kSelected, kDecided, stages_.decide_us},
                {kAttentionBegins, kAttended, attention_us}};
  for (const auto& [from, to, us] : stages) {
    PREFILLD_ASSIGN_OR_RETURN(us, device_.ElapsedUs(from, to));
  }
  stages_.decide_us -= stages_.pivots_us;
  report->attention_us = static_cast<int64_t>(attention_us + stages_.pivots_us);
  report->pattern_us =
      static_cast<int64_t>(stages_.estimate_us + stages_.select_us + stages_.decide_us);
  return absl::OkStatus();
}

absl::Status PatternSharing::Measure(const float* block_mass, const uint32_t* pattern, int slot) {
  return device_.ops().MeasurePattern(
      {.block_mass = block_mass,
       .pattern = pattern,
       .num_query_blocks = num_query_blocks_,
       .num_key_blocks = num_blocks_,
       .mass = scratch_.figures.as<double>() + scratch_.MassSlot(slot),
       .blocks = scratch_.figures.as<int64_t>() + scratch_.BlocksSlot(slot)});
}

absl::Status PatternSharing::DownloadFigures() {
  return device_.StartDownload(scratch_.figures_host.data(), scratch_.figures.data(),
                               scratch_.figures.bytes());
}

PatternFigures PatternSharing::Figures(int slot) const {
  const int64_t* figures = scratch_.figures_host.as<int64_t>();
  return {.mass = std::bit_cast<double>(figures[scratch_.MassSlot(slot)]),
          .blocks = figures[scratch_.BlocksSlot(slot)]};
}

}  // namespace prefilld::model
