#include "model/pattern_sharing.h"

#include <algorithm>
#include <bit>

#include "model/stopwatch.h"

namespace prefilld::model {
namespace {

// Block masses of pivots held at a time where they fit into this: launches with several pivots
// fill the device at lengths where one does not.
constexpr int64_t kPivotMassBytes = int64_t{64} << 20;

// Points on the device's time line.
enum Mark { kBegin, kEstimated, kSelected, kExpanded, kPivotsMeasured, kDecided };

int64_t CausalBlocks(int64_t num_blocks) { return num_blocks * (num_blocks + 1) / 2; }

// Blocks of `row` that `old` has not.
int64_t CountNewBlocks(absl::Span<const uint32_t> row, absl::Span<const uint32_t> old) {
  int64_t count = 0;
  for (size_t w = 0; w < row.size(); ++w) count += std::popcount(row[w] & ~old[w]);
  return count;
}

}  // namespace

absl::StatusOr<std::unique_ptr<PatternSharing>> PatternSharing::Create(Backend* backend,
                                                                       const ModelConfig* config,
                                                                       const HeadClusters* clusters,
                                                                       int64_t max_tokens,
                                                                       int block_tokens) {
  std::unique_ptr<PatternSharing> sharing(
      new PatternSharing(backend, config, clusters, block_tokens));
  if (absl::Status status = sharing->Allocate(max_tokens); !status.ok()) return status;
  return sharing;
}

absl::Status PatternSharing::Allocate(int64_t max_tokens) {
  const int64_t heads = config_.num_heads;
  const int64_t blocks = kernels::CeilDiv(max_tokens, block_tokens_);
  const int64_t words = kernels::PatternWords(blocks);
  const int64_t mass_bytes = blocks * blocks * int64_t{sizeof(float)};
  const int64_t scratch_bytes =
      std::max(kernels::EstimateScratchBytes(config_.num_heads, max_tokens, block_tokens_),
               kernels::VerticalSlashScratchBytes(config_.num_heads, max_tokens));
  const struct {
    DeviceBuffer& buffer;
    int64_t bytes;
  } wanted[] = {
      {block_estimate_, heads * blocks * int64_t{sizeof(float)}},
      {vertical_, heads * max_tokens * int64_t{sizeof(float)}},
      {slash_, heads * max_tokens * int64_t{sizeof(float)}},
      {scratch_, scratch_bytes},
      {columns_, heads * words * int64_t{sizeof(uint32_t)}},
      {diagonals_, heads * words * int64_t{sizeof(uint32_t)}},
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
    absl::StatusOr<DeviceBuffer> allocated = backend_.Allocate(static_cast<size_t>(bytes));
    if (!allocated.ok()) return allocated.status();
    buffer = *std::move(allocated);
  }
  absl::StatusOr<std::unique_ptr<RecallAudit>> audit =
      RecallAudit::Create(&backend_, config_.num_heads);
  if (!audit.ok()) return audit.status();
  audit_ = *std::move(audit);
  pivots_.resize(clusters_.num_clusters);
  for (ClusterPivot& pivot : pivots_) {
    pivot.estimate.reserve(blocks);
    pivot.last_row.reserve(words);
  }
  no_clusters_.assign(heads, HeadClusters::kNoCluster);
  estimate_.resize(heads * blocks);
  last_rows_host_.resize(heads * words);
  figures_host_.resize(kFiguresPerHead * heads);
  head_blocks_.resize(heads);
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
  Stopwatch stopwatch;
  if (absl::Status status = Estimate(attention); !status.ok()) return status;

  const absl::Span<const int> cluster_of = options_.policy == AttentionPolicy::kShare
                                               ? absl::MakeConstSpan(clusters_.cluster_of[layer])
                                               : absl::MakeConstSpan(no_clusters_);
  const absl::Span<const float> estimate(estimate_.data(), config_.num_heads * num_blocks_);
  Stopwatch host_stopwatch;
  const std::vector<int> pivots = ChoosePivots(cluster_of, estimate, pivots_, options_);
  int64_t host_us = host_stopwatch.LapUs();
  report->pattern_us += stopwatch.LapUs();

  const int64_t mass_floats = static_cast<int64_t>(pivot_mass_.bytes() / sizeof(float));
  const size_t at_a_time =
      static_cast<size_t>(std::max<int64_t>(1, mass_floats / (num_blocks_ * num_blocks_)));
  for (size_t first = 0; first < pivots.size(); first += at_a_time) {
    const auto batch = absl::MakeConstSpan(pivots).subspan(first, at_a_time);
    if (absl::Status status = AttendPivots(attention, batch); !status.ok()) return status;
    report->attention_us += stopwatch.LapUs();
    if (absl::Status status = MeasurePivots(layer, cluster_of, batch); !status.ok()) return status;
    report->pattern_us += stopwatch.LapUs();
  }

  if (!pivots.empty()) {
    if (absl::Status status = backend_.Mark(kPivotsMeasured); !status.ok()) return status;
  }
  host_stopwatch.LapUs();
  std::vector<HeadRole> roles(config_.num_heads, HeadRole::kPivot);
  for (int head = 0; head < config_.num_heads; ++head) {
    if (std::binary_search(pivots.begin(), pivots.end(), head)) continue;
    const int cluster = cluster_of[head];
    roles[head] =
        DecideHead(layer, EstimateOf(head),
                   cluster == HeadClusters::kNoCluster ? nullptr : &pivots_[cluster], options_);
  }
  if (absl::Status status = AssignPatterns(cluster_of, roles); !status.ok()) return status;
  host_us += host_stopwatch.LapUs();
  if (absl::Status status = backend_.Mark(kDecided); !status.ok()) return status;
  Summarize(roles, report);
  report->pattern_us += stopwatch.LapUs();
  stages_.host_us = static_cast<double>(host_us);
  if (absl::Status status = MeasureStages(pivots.empty()); !status.ok()) return status;

  if (work_.empty()) return absl::OkStatus();
  kernels::AttentionParams params = attention;
  params.work = work_.data();
  params.num_work = static_cast<int>(work_.size());
  if (options_.recall_audit_rows > 0) {
    if (absl::Status status = Audit(layer, params, roles, report); !status.ok()) return status;
    report->audit_us = stopwatch.LapUs();
  }
  absl::Status status = backend_.Attention(params);
  if (status.ok()) status = backend_.Synchronize();
  report->attention_us += stopwatch.LapUs();
  return status;
}

absl::Status PatternSharing::Audit(int layer, const kernels::AttentionParams& attention,
                                   absl::Span<const HeadRole> roles, LayerReport* report) {
  std::vector<float> recall(attention.num_work);
  // The estimate has been read; what it was written to is free.
  absl::Status status = audit_->Measure(attention, layer, options_.recall_audit_rows,
                                        {.block_mass = block_estimate_.as<float>(),
                                         .vertical = vertical_.as<float>(),
                                         .slash = slash_.as<float>(),
                                         .scratch = scratch_.data()},
                                        absl::MakeSpan(recall));
  for (int i = 0; i < attention.num_work && status.ok(); ++i) {
    const int head = attention.work[i].head;
    const PatternSource source =
        roles[head] == HeadRole::kShared ? PatternSource::kPivot : PatternSource::kVerticalSlash;
    report->recall.push_back({layer, head, source, recall[i]});
  }
  return status;
}

absl::Status PatternSharing::MeasureStages(bool pivots_exist) {
  const struct {
    double& us;
    Mark from, to;
  } stages[] = {{stages_.estimate_us, kBegin, kEstimated},
                {stages_.vertical_slash_us, kEstimated, kSelected},
                {stages_.expand_us, kSelected, kExpanded},
                {stages_.decide_us, pivots_exist ? kExpanded : kPivotsMeasured, kDecided}};
  for (const auto& [us, from, to] : stages) {
    const absl::StatusOr<double> elapsed = backend_.ElapsedUs(from, to);
    if (!elapsed.ok()) return elapsed.status();
    us = *elapsed;
  }
  return absl::OkStatus();
}

absl::Status PatternSharing::Estimate(const kernels::AttentionParams& attention) {
  const int64_t num_queries = std::min<int64_t>(block_tokens_, num_tokens_);
  const int64_t query_offset = (attention.num_queries - num_queries) * config_.num_heads *
                               config_.head_dim *
                               static_cast<int64_t>(kernels::SizeOf(backend_.compute_dtype()));
  absl::Status status = backend_.Mark(kBegin);
  if (!status.ok()) return status;
  status = backend_.Estimate({.q = static_cast<const char*>(attention.q) + query_offset,
                              .k = attention.k,
                              .num_queries = num_queries,
                              .num_keys = num_tokens_,
                              .kv_head_stride = attention.kv_head_stride,
                              .num_heads = config_.num_heads,
                              .num_kv_heads = config_.num_kv_heads,
                              .head_dim = config_.head_dim,
                              .block_tokens = block_tokens_,
                              .scale = attention.scale,
                              .block_mass = block_estimate_.as<float>(),
                              .vertical = vertical_.as<float>(),
                              .slash = slash_.as<float>(),
                              .scratch = scratch_.data()});
  if (status.ok()) status = backend_.Mark(kEstimated);
  if (status.ok()) {
    status = backend_.VerticalSlash({.vertical = vertical_.as<float>(),
                                     .slash = slash_.as<float>(),
                                     .num_keys = num_tokens_,
                                     .num_heads = config_.num_heads,
                                     .block_tokens = block_tokens_,
                                     .gamma = options_.gamma,
                                     .min_budget_tokens = options_.min_budget_tokens,
                                     .columns = columns_.as<uint32_t>(),
                                     .diagonals = diagonals_.as<uint32_t>(),
                                     .scratch = scratch_.data()});
  }
  if (status.ok()) status = backend_.Mark(kSelected);
  // Sharing heads and pivots will not use theirs; one launch for all is cheaper than choosing.
  if (status.ok()) {
    status =
        backend_.ExpandVerticalSlash({.columns = columns_.as<uint32_t>(),
                                      .diagonals = diagonals_.as<uint32_t>(),
                                      .num_query_blocks = num_blocks_,
                                      .num_key_blocks = num_blocks_,
                                      .pattern = VerticalSlashPattern(0),
                                      .num_heads = config_.num_heads,
                                      .blocks = figures_.as<int64_t>() + VerticalSlashSlot(0)});
  }
  if (status.ok()) status = backend_.Mark(kExpanded);
  if (status.ok()) {
    status = backend_.Download(estimate_.data(), block_estimate_.data(),
                               config_.num_heads * num_blocks_ * sizeof(float));
  }
  if (status.ok()) status = DownloadFigures();
  if (!status.ok()) return status;
  for (int head = 0; head < config_.num_heads; ++head) {
    head_blocks_[head] = figures_host_[VerticalSlashSlot(head)];
  }
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
  if (absl::Status status = backend_.Attention(params); !status.ok()) return status;
  return backend_.Synchronize();
}

absl::Status PatternSharing::MeasurePivots(int layer, absl::Span<const int> cluster_of,
                                           absl::Span<const int> pivots) {
  // Slot 2 i: the pattern of pivot i; slot 2 i + 1: its own vertical-slash set.
  for (size_t i = 0; i < pivots.size(); ++i) {
    const int slot = static_cast<int>(2 * i);
    uint32_t* pattern = PivotPattern(cluster_of[pivots[i]]);
    absl::Status status = backend_.SelectRows({.block_mass = PivotMass(i),
                                               .num_query_blocks = num_blocks_,
                                               .num_key_blocks = num_blocks_,
                                               .gamma = options_.gamma,
                                               .pattern = pattern});
    if (status.ok()) status = Measure(PivotMass(i), pattern, slot);
    if (status.ok()) status = Measure(PivotMass(i), VerticalSlashPattern(pivots[i]), slot + 1);
    if (!status.ok()) return status;
  }
  if (absl::Status status = DownloadFigures(); !status.ok()) return status;

  for (size_t i = 0; i < pivots.size(); ++i) {
    const int slot = static_cast<int>(2 * i);
    const int cluster = cluster_of[pivots[i]];
    const absl::Span<const float> estimate = EstimateOf(pivots[i]);
    ClusterPivot& pivot = pivots_[cluster];
    pivot.layer = layer;
    pivot.head = pivots[i];
    pivot.estimate.assign(estimate.begin(), estimate.end());
    pivot.worth_sharing = WorthSharing(Figures(slot), Figures(slot + 1), options_.coverage);
    pivot.pattern_blocks = Figures(slot).blocks;
    pivot.last_row.resize(row_words());
    absl::Status status = backend_.Download(pivot.last_row.data(),
                                            PivotPattern(cluster) + (num_blocks_ - 1) * row_words(),
                                            row_words() * sizeof(uint32_t));
    if (!status.ok()) return status;
  }
  return absl::OkStatus();
}

absl::Status PatternSharing::AssignPatterns(absl::Span<const int> cluster_of,
                                            absl::Span<const HeadRole> roles) {
  const int64_t words = row_words();
  bool any_shared = false;
  work_.clear();
  for (int head = 0; head < config_.num_heads; ++head) {
    kernels::HeadWork work = {.head = head};
    switch (roles[head]) {
      case HeadRole::kPivot:
        head_blocks_[head] = CausalBlocks(num_blocks_);
        continue;
      case HeadRole::kVerticalSlash:
        work.pattern = VerticalSlashPattern(head);
        break;
      case HeadRole::kShared: {
        any_shared = true;
        const ClusterPivot& pivot = pivots_[cluster_of[head]];
        const auto last_row = absl::MakeSpan(last_rows_host_).subspan(head * words, words);
        std::fill(last_row.begin(), last_row.end(), 0u);
        SelectBlocks(EstimateOf(head), options_.gamma, last_row);
        head_blocks_[head] = pivot.pattern_blocks + CountNewBlocks(last_row, pivot.last_row);
        work.pattern = PivotPattern(cluster_of[head]);
        work.last_row = last_rows_.as<uint32_t>() + head * words;
        break;
      }
    }
    work_.push_back(work);
  }
  if (!any_shared) return absl::OkStatus();
  return backend_.Upload(last_rows_.data(), last_rows_host_.data(),
                         config_.num_heads * words * sizeof(uint32_t));
}

absl::Status PatternSharing::Measure(const float* block_mass, const uint32_t* pattern, int slot) {
  return backend_.MeasurePattern({.block_mass = block_mass,
                                  .pattern = pattern,
                                  .num_query_blocks = num_blocks_,
                                  .num_key_blocks = num_blocks_,
                                  .mass = figures_.as<double>() + MassSlot(slot),
                                  .blocks = figures_.as<int64_t>() + BlocksSlot(slot)});
}

absl::Status PatternSharing::DownloadFigures() {
  return backend_.Download(figures_host_.data(), figures_.data(), figures_.bytes());
}

PatternFigures PatternSharing::Figures(int slot) const {
  return {.mass = std::bit_cast<double>(figures_host_[MassSlot(slot)]),
          .blocks = figures_host_[BlocksSlot(slot)]};
}

void PatternSharing::Summarize(absl::Span<const HeadRole> roles, LayerReport* report) const {
  int64_t blocks = 0;
  for (size_t head = 0; head < roles.size(); ++head) {
    switch (roles[head]) {
      case HeadRole::kPivot:
        ++report->pivot_heads;
        break;
      case HeadRole::kShared:
        ++report->shared_heads;
        break;
      case HeadRole::kVerticalSlash:
        ++report->vertical_slash_heads;
        break;
    }
    blocks += head_blocks_[head];
  }
  report->density = static_cast<double>(blocks) / (static_cast<double>(CausalBlocks(num_blocks_)) *
                                                   static_cast<double>(roles.size()));
}

}  // namespace prefilld::model
