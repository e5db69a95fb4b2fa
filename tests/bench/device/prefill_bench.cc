#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "tests/bench/device/benches.h"

namespace prefilld::bench {
namespace {

// The sums over the layers of one prefill.
struct Totals {
  double seconds = 0.0;
  double attention_ms = 0.0;
  double pattern_ms = 0.0;
  double queries = 0.0;
  double density = 0.0;  // times queries
  int pivots = 0;
  int shared = 0;
};

absl::StatusOr<Totals> RunOnce(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                               const model::AttentionOptions& options) {
  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<std::unique_ptr<model::PrefillSequence>> sequence = engine.Start(tokens, options);
  if (!sequence.ok()) return sequence.status();
  Totals totals;
  const int num_layers = engine.info().config.num_layers;
  for (int layer = 0; layer < num_layers; ++layer) {
    absl::StatusOr<model::LayerReport> report = (*sequence)->RunLayer();
    if (!report.ok()) return report.status();
    (*sequence)->ReleaseKv(layer);
    totals.attention_ms += static_cast<double>(report->attention_us) / 1e3;
    totals.pattern_ms += static_cast<double>(report->pattern_us) / 1e3;
    totals.queries += static_cast<double>(report->num_queries);
    totals.density += report->density * static_cast<double>(report->num_queries);
    totals.pivots += report->pivot_heads;
    totals.shared += report->shared_heads;
  }
  if (auto logits = (*sequence)->FinalLogits(); !logits.ok()) return logits.status();
  totals.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return totals;
}

}  // namespace

absl::Status BenchPrefill(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                          const model::AttentionOptions& options, bool warm_up, int runs,
                          Report* report) {
  std::vector<Totals> all;
  for (int i = warm_up ? -1 : 0; i < runs; ++i) {
    absl::StatusOr<Totals> totals = RunOnce(engine, tokens, options);
    if (!totals.ok()) return totals.status();
    if (i >= 0) all.push_back(*totals);
  }
  std::sort(all.begin(), all.end(),
            [](const Totals& a, const Totals& b) { return a.seconds < b.seconds; });
  const Totals& median = all[all.size() / 2];
  Row row{.what = absl::StrCat("prefill ", model::Name(options.policy)),
          .shape = absl::StrCat(tokens.size(), " tokens ", engine.info().model_name)};
  row.median_ms = 1e3 * median.seconds;
  row.min_ms = 1e3 * all.front().seconds;
  row.max_ms = 1e3 * all.back().seconds;
  row.more = {{"tokens_per_s", static_cast<double>(tokens.size()) / median.seconds},
              {"density", median.density / median.queries},
              {"attention_ms", median.attention_ms},
              {"pattern_ms", median.pattern_ms},
              {"pivots", median.pivots},
              {"shared", median.shared},
              {"device_gib", static_cast<double>(engine.allocated_bytes()) / (1 << 30)}};
  report->Add(std::move(row));
  return absl::OkStatus();
}

}  // namespace prefilld::bench
