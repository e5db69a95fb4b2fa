#include "model/sparse/pattern_sharing.h"

#include <algorithm>
#include <bit>

#include "model/device/stopwatch.h"

namespace prefilld::model {
namespace {

// Block masses of pivots held at a time where they fit into this: launches with several pivots
// fill the device at lengths where one does not.
constexpr int64_t kPivotMassBytes = int64_t{64} << 20;

// Points on the device's time line.
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

int64_t CausalBlocks(int64_t num_blocks) { return num_blocks * (num_blocks + 1) / 2; }

// Blocks of `row` that `old` has not.
int64_t CountNewBlocks(absl::Span<const uint32_t> row, absl::Span<const uint32_t> old) {
  int64_t count = 0;
  for (size_t w = 0; w < row.size(); ++w) count += std::popcount(row[w] & ~old[w]);
  return count;
}

}  // namespace

absl::StatusOr<std::unique_ptr<PatternSharing>> PatternSharing::Create(Device* device,
                                                                       const ModelConfig* config,
                                                                       const HeadClusters* clusters,
                                                                       int64_t max_tokens,
                                                                       int block_tokens) {
  std::unique_ptr<PatternSharing> sharing(
      new PatternSharing(device, config, clusters, block_tokens));
  if (absl::Status status = sharing->Allocate(max_tokens); !status.ok()) return status;
  return sharing;
}

absl::Status PatternSharing::Allocate(int64_t max_tokens) {
  const int64_t heads = config_.num_heads;
  const int64_t blocks = kernels::CeilDiv(max_tokens, block_tokens_);
  const int64_t words = kernels::PatternWords(blocks);
  const int64_t mass_bytes = blocks * blocks * int64_t{sizeof(float)};
  const struct {
    DeviceBuffer& buffer;
    int64_t bytes;
  } wanted[] = {
      {last_rows_, heads * words * int64_t{sizeof(uint32_t)}},
      {vertical_slash_patterns_, heads * blocks * words * int64_t{sizeof(uint32_t)}},
      {pivot_patterns_, clusters_.num_clusters * blocks * words * int64_t{sizeof(uint32_t)}},
      {pivot_mass_,
       clusters_.empty()
           ? 0
           : std::max(mass_bytes, std::min(mass_bytes * clusters_.num_clusters, kPivotMassBytes))},
      {figures_, kFiguresPerHead * heads * int64_t{sizeof(int64_t)}},
  };
  for (const auto& [buffer, bytes] : wanted) {
    if (bytes == 0) continue;
    absl::StatusOr<DeviceBuffer> allocated = device_.Allocate(static_cast<size_t>(bytes));
    if (!allocated.ok()) return allocated.status();
    buffer = *std::move(allocated);
  }
  absl::StatusOr<std::unique_ptr<HeadEstimate>> head_estimate =
      HeadEstimate::Create(&device_, config_.num_heads, max_tokens, block_tokens_);
  if (!head_estimate.ok()) return head_estimate.status();
  head_estimate_ = *std::move(head_estimate);
  const std::pair<DeviceBuffer&, const DeviceBuffer&> host_copies[] = {
      {estimate_, head_estimate_->block_mass()},
      {last_rows_host_, last_rows_},
      {figures_host_, figures_}};
  for (const auto& [copy, original] : host_copies) {
    absl::StatusOr<DeviceBuffer> allocated = device_.AllocateStaging(original.bytes());
    if (!allocated.ok()) return allocated.status();
    copy = *std::move(allocated);
  }
  absl::StatusOr<std::unique_ptr<RecallAudit>> audit =
      RecallAudit::Create(&device_, config_.num_heads);
  if (!audit.ok()) return audit.status();
  audit_ = *std::move(audit);
  pivots_.resize(clusters_.num_clusters);
  for (ClusterPivot& pivot : pivots_) {
    pivot.estimate.reserve(blocks);
    pivot.last_row.reserve(words);
  }
  no_clusters_.assign(heads, HeadClusters::kNoCluster);
  roles_.resize(heads);
  work_.reserve(heads);
  return absl::OkStatus();
}

void PatternSharing::StartPrompt(int64_t num_tokens, const AttentionOptions& options) {
  options_ = options;
  num_tokens_ = num_tokens;
  num_blocks_ = kernels::CeilDiv(num_tokens, block_tokens_);
  for (ClusterPivot& pivot : pivots_) pivot.layer = pivot.head = ClusterPivot::kNone;
}

absl::Status PatternSharing::Attend(int layer, const kernels::AttentionParams& attention,
                                    LayerReport* report) {
  cluster_of_ = options_.policy == AttentionPolicy::kShare
                    ? absl::MakeConstSpan(clusters_.cluster_of[layer])
                    : absl::MakeConstSpan(no_clusters_);
  may_share_ = options_.coverage > 0.0f &&
               std::any_of(cluster_of_.begin(), cluster_of_.end(), [this](int cluster) {
                 return cluster != HeadClusters::kNoCluster &&
                        (!pivots_[cluster].exists() || pivots_[cluster].worth_sharing);
               });
  stages_ = {};
  std::fill(roles_.begin(), roles_.end(), HeadRole::kVerticalSlash);
  // What the last layer's report would have waited for: its sources are written again.
  if (absl::Status status = device_.FinishDownloads(); !status.ok()) return status;
  if (absl::Status status = Prepare(attention); !status.ok()) return status;
  if (may_share_) {
    if (absl::Status status = Decide(layer, attention); !status.ok()) return status;
  }
  AssignWork();
  if (absl::Status status = device_.Mark(kDecided); !status.ok()) return status;
  if (absl::Status status = AttendSparse(layer, attention, report); !status.ok()) return status;
  return DownloadForReport();
}

absl::Status PatternSharing::Prepare(const kernels::AttentionParams& attention) {
  absl::Status status = device_.Mark(kBegin);
  if (status.ok()) status = head_estimate_->OfLastQueries(attention);
  // The host decides by it while the device goes on to the sets.
  if (status.ok() && may_share_) {
    status = device_.StartDownload(estimate_.data(), head_estimate_->block_mass().data(),
                                   config_.num_heads * num_blocks_ * sizeof(float));
  }
  if (status.ok()) status = device_.Mark(kEstimated);
  if (status.ok()) status = SelectSets();
  if (status.ok()) status = device_.Mark(kSelected);
  return status;
}

// Of all heads, whatever they will turn out to do: one launch is cheaper than choosing, and the
// device would only wait for the host's decisions.
absl::Status PatternSharing::SelectSets() {
  absl::Status status = head_estimate_->BuildVerticalSlash(
      options_.gamma_of_vertical_slash(), options_.min_budget_tokens, VerticalSlashPattern(0),
      figures_.as<int64_t>() + VerticalSlashSlot(0));
  // Each head's own blocks of the last row, should it share.
  if (status.ok() && may_share_) {
    status = device_.ops().SelectRows({.block_mass = head_estimate_->block_mass().as<float>(),
                                       .num_query_blocks = 1,
                                       .num_key_blocks = num_blocks_,
                                       .gamma = options_.gamma,
                                       .pattern = last_rows_.as<uint32_t>(),
                                       .num_heads = config_.num_heads});
  }
  return status;
}

absl::Status PatternSharing::Decide(int layer, const kernels::AttentionParams& attention) {
  if (absl::Status status = device_.FinishDownloads(); !status.ok()) return status;
  Stopwatch stopwatch;
  const absl::Span<const float> estimate(estimate_.as<float>(), config_.num_heads * num_blocks_);
  const std::vector<int> pivots = ChoosePivots(cluster_of_, estimate, pivots_, options_);
  stages_.host_us += static_cast<double>(stopwatch.LapUs());

  const int64_t mass_floats = static_cast<int64_t>(pivot_mass_.bytes() / sizeof(float));
  const size_t at_a_time =
      static_cast<size_t>(std::max<int64_t>(1, mass_floats / (num_blocks_ * num_blocks_)));
  for (size_t first = 0; first < pivots.size(); first += at_a_time) {
    const auto batch = absl::MakeConstSpan(pivots).subspan(first, at_a_time);
    if (absl::Status status = AttendPivots(attention, batch); !status.ok()) return status;
    if (absl::Status status = MeasurePivots(layer, batch); !status.ok()) return status;
  }

  stopwatch.LapUs();
  for (int head = 0; head < config_.num_heads; ++head) {
    const int cluster = cluster_of_[head];
    if (std::binary_search(pivots.begin(), pivots.end(), head)) {
      roles_[head] = HeadRole::kPivot;
    } else if (cluster != HeadClusters::kNoCluster) {
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
  kernels::AttentionParams params = attention;
  params.work = work_.data();
  params.num_work = static_cast<int>(work_.size());
  absl::Status status = device_.Mark(kPivotsBegin);
  if (status.ok()) status = device_.ops().Attention(params);
  if (status.ok()) status = device_.Mark(kPivotsAttended);
  return status;
}

absl::Status PatternSharing::MeasurePivots(int layer, absl::Span<const int> pivots) {
  const int64_t words = row_words();
  // Slot 2 i: the pattern of pivot i; slot 2 i + 1: its own vertical-slash set.
  for (size_t i = 0; i < pivots.size(); ++i) {
    const int slot = static_cast<int>(2 * i);
    uint32_t* pattern = PivotPattern(cluster_of_[pivots[i]]);
    absl::Status status = device_.ops().SelectRows({.block_mass = PivotMass(i),
                                                    .num_query_blocks = num_blocks_,
                                                    .num_key_blocks = num_blocks_,
                                                    .gamma = options_.gamma,
                                                    .pattern = pattern});
    if (status.ok()) status = Measure(PivotMass(i), pattern, slot);
    if (status.ok()) status = Measure(PivotMass(i), VerticalSlashPattern(pivots[i]), slot + 1);
    if (status.ok()) {
      status = device_.StartDownload(last_rows_host_.as<uint32_t>() + i * words,
                                     pattern + (num_blocks_ - 1) * words, words * sizeof(uint32_t));
    }
    if (!status.ok()) return status;
  }
  absl::Status status = DownloadFigures();
  if (status.ok()) status = device_.FinishDownloads();
  if (!status.ok()) return status;
  const absl::StatusOr<double> attention_us = device_.ElapsedUs(kPivotsBegin, kPivotsAttended);
  if (!attention_us.ok()) return attention_us.status();
  stages_.pivots_us += *attention_us;

  for (size_t i = 0; i < pivots.size(); ++i) {
    const int slot = static_cast<int>(2 * i);
    const absl::Span<const float> estimate = EstimateOf(pivots[i]);
    const absl::Span<const uint32_t> last_row = HostLastRow(static_cast<int>(i));
    ClusterPivot& pivot = pivots_[cluster_of_[pivots[i]]];
    pivot.layer = layer;
    pivot.head = pivots[i];
    pivot.estimate.assign(estimate.begin(), estimate.end());
    pivot.worth_sharing = WorthSharing(Figures(slot), Figures(slot + 1), options_.coverage);
    pivot.pattern_blocks = Figures(slot).blocks;
    pivot.last_row.assign(last_row.begin(), last_row.end());
  }
  return absl::OkStatus();
}

void PatternSharing::AssignWork() {
  work_.clear();
  for (int head = 0; head < config_.num_heads; ++head) {
    switch (roles_[head]) {
      case HeadRole::kPivot:
        break;
      case HeadRole::kVerticalSlash:
        work_.push_back({.head = head, .pattern = VerticalSlashPattern(head)});
        break;
      case HeadRole::kShared:
        work_.push_back({.head = head,
                         .pattern = PivotPattern(cluster_of_[head]),
                         .last_row = last_rows_.as<uint32_t>() + head * row_words()});
        break;
    }
  }
}

absl::Status PatternSharing::AttendSparse(int layer, const kernels::AttentionParams& attention,
                                          LayerReport* report) {
  kernels::AttentionParams params = attention;
  params.work = work_.data();
  params.num_work = static_cast<int>(work_.size());
  if (options_.recall_audit_rows > 0 && !work_.empty()) {
    // What came before is not the audit's time.
    if (absl::Status status = device_.Synchronize(); !status.ok()) return status;
    Stopwatch stopwatch;
    if (absl::Status status = Audit(layer, params, report); !status.ok()) return status;
    report->audit_us = stopwatch.LapUs();
  }
  absl::Status status = device_.Mark(kAttentionBegins);
  if (status.ok() && !work_.empty()) status = device_.ops().Attention(params);
  if (status.ok()) status = device_.Mark(kAttended);
  return status;
}

absl::Status PatternSharing::Audit(int layer, const kernels::AttentionParams& attention,
                                   LayerReport* report) {
  std::vector<float> recall(attention.num_work);
  // The estimate has been read; what it was written to is free.
  absl::Status status = audit_->Measure(attention, layer, options_.recall_audit_rows,
                                        *head_estimate_, absl::MakeSpan(recall));
  for (int i = 0; i < attention.num_work && status.ok(); ++i) {
    const int head = attention.work[i].head;
    const PatternSource source =
        roles_[head] == HeadRole::kShared ? PatternSource::kPivot : PatternSource::kVerticalSlash;
    report->recall.push_back({layer, head, source, recall[i]});
  }
  return status;
}

absl::Status PatternSharing::DownloadForReport() {
  absl::Status status = DownloadFigures();
  if (status.ok() && may_share_) {
    status = device_.StartDownload(last_rows_host_.data(), last_rows_.data(),
                                   config_.num_heads * row_words() * sizeof(uint32_t));
  }
  return status;
}

absl::Status PatternSharing::Report(LayerReport* report) {
  absl::Status status = device_.FinishDownloads();
  if (status.ok()) status = MeasureTimes(report);
  if (!status.ok()) return status;
  int64_t blocks = 0;
  for (int head = 0; head < config_.num_heads; ++head) {
    switch (roles_[head]) {
      case HeadRole::kPivot:
        ++report->pivot_heads;
        blocks += CausalBlocks(num_blocks_);
        break;
      case HeadRole::kVerticalSlash:
        ++report->vertical_slash_heads;
        blocks += figures_host_.as<int64_t>()[VerticalSlashSlot(head)];
        break;
      case HeadRole::kShared: {
        ++report->shared_heads;
        const ClusterPivot& pivot = pivots_[cluster_of_[head]];
        blocks += pivot.pattern_blocks + CountNewBlocks(HostLastRow(head), pivot.last_row);
        break;
      }
    }
  }
  report->density = static_cast<double>(blocks) / (static_cast<double>(CausalBlocks(num_blocks_)) *
                                                   static_cast<double>(config_.num_heads));
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
    const absl::StatusOr<double> elapsed = device_.ElapsedUs(from, to);
    if (!elapsed.ok()) return elapsed.status();
    us = *elapsed;
  }
  stages_.decide_us -= stages_.pivots_us;
  report->attention_us = static_cast<int64_t>(attention_us + stages_.pivots_us);
  report->pattern_us =
      static_cast<int64_t>(stages_.estimate_us + stages_.select_us + stages_.decide_us);
  return absl::OkStatus();
}

absl::Status PatternSharing::Measure(const float* block_mass, const uint32_t* pattern, int slot) {
  return device_.ops().MeasurePattern({.block_mass = block_mass,
                                       .pattern = pattern,
                                       .num_query_blocks = num_blocks_,
                                       .num_key_blocks = num_blocks_,
                                       .mass = figures_.as<double>() + MassSlot(slot),
                                       .blocks = figures_.as<int64_t>() + BlocksSlot(slot)});
}

absl::Status PatternSharing::DownloadFigures() {
  return device_.StartDownload(figures_host_.data(), figures_.data(), figures_.bytes());
}

PatternFigures PatternSharing::Figures(int slot) const {
  const int64_t* figures = figures_host_.as<int64_t>();
  return {.mass = std::bit_cast<double>(figures[MassSlot(slot)]),
          .blocks = figures[BlocksSlot(slot)]};
}

}  // namespace prefilld::model
