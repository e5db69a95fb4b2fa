#include <algorithm>
#include <chrono>
#include <cstddef>
#include <utility>

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

void AddRow(const model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
            model::AttentionPolicy policy, std::vector<Totals> runs, Report* report) {
  std::sort(runs.begin(), runs.end(),
            [](const Totals& a, const Totals& b) { return a.seconds < b.seconds; });
  const Totals& median = runs[runs.size() / 2];
  Row row{.what = absl::StrCat("prefill ", model::Name(policy)),
          .shape = absl::StrCat(tokens.size(), " tokens ", engine.info().model_name)};
  row.median_ms = 1e3 * median.seconds;
  row.min_ms = 1e3 * runs.front().seconds;
  row.max_ms = 1e3 * runs.back().seconds;
  row.more = {{"tokens_per_s", static_cast<double>(tokens.size()) / median.seconds},
              {"density", median.density / median.queries},
              {"attention_ms", median.attention_ms},
              {"pattern_ms", median.pattern_ms},
              {"pivots", median.pivots},
              {"shared", median.shared},
              {"device_gib", static_cast<double>(engine.allocated_bytes()) / (1 << 30)}};
  report->Add(std::move(row));
}

}  // namespace

absl::Status BenchPrefill(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                          const std::vector<model::AttentionOptions>& settings, bool warm_up,
                          int runs, Report* report) {
  std::vector<std::vector<Totals>> all(settings.size());
  for (int i = warm_up ? -1 : 0; i < runs; ++i) {
    for (size_t setting = 0; setting < settings.size(); ++setting) {
      absl::StatusOr<Totals> totals = RunOnce(engine, tokens, settings[setting]);
      if (!totals.ok()) return totals.status();
      if (i >= 0) all[setting].push_back(*totals);
    }
  }
  for (size_t setting = 0; setting < settings.size(); ++setting) {
    AddRow(engine, tokens, settings[setting].policy, all[setting], report);
  }
  return absl::OkStatus();
}

namespace {

// Returns the milliseconds of one pass.
absl::StatusOr<double> RunPass(model::PrefillEngine& engine,
                               absl::Span<const model::PromptInput> prompts) {
  const auto start = std::chrono::steady_clock::now();
  absl::StatusOr<std::unique_ptr<model::PrefillSequence>> sequence = engine.Start(prompts);
  if (!sequence.ok()) return sequence.status();
  for (int layer = 0; layer < engine.info().config.num_layers; ++layer) {
    if (auto report = (*sequence)->RunLayer(); !report.ok()) return report.status();
    (*sequence)->ReleaseKv(layer);
  }
  if (auto logits = (*sequence)->FinalLogits(); !logits.ok()) return logits.status();
  const auto took = std::chrono::steady_clock::now() - start;
  return std::chrono::duration<double, std::milli>(took).count();
}

Row MakeRow(const std::string& what, const std::string& shape, std::vector<double> times_ms,
            size_t num_prompts, size_t num_tokens) {
  std::sort(times_ms.begin(), times_ms.end());
  Row row{.what = what, .shape = shape};
  row.median_ms = times_ms[times_ms.size() / 2];
  row.min_ms = times_ms.front();
  row.max_ms = times_ms.back();
  const double per_second = 1e3 * static_cast<double>(num_prompts) / row.median_ms;
  row.more = {{"requests_per_s", per_second},
              {"tokens_per_s", per_second * static_cast<double>(num_tokens)}};
  return row;
}

}  // namespace

absl::Status BenchBatch(model::PrefillEngine& engine, const std::vector<uint32_t>& tokens,
                        int num_prompts, int runs, Report* report) {
  model::PromptInput prompt = {tokens, {}};
  prompt.attention.policy = model::AttentionPolicy::kDense;
  const std::vector<model::PromptInput> prompts(num_prompts, prompt);
  std::vector<double> together_ms, one_by_one_ms;
  for (int i = -1; i < runs; ++i) {  // the first warms up
    absl::StatusOr<double> together = RunPass(engine, prompts);
    if (!together.ok()) return together.status();
    double one_by_one = 0.0;
    for (int j = 0; j < num_prompts; ++j) {
      absl::StatusOr<double> alone = RunPass(engine, absl::MakeConstSpan(&prompt, 1));
      if (!alone.ok()) return alone.status();
      one_by_one += *alone;
    }
    if (i < 0) continue;
    together_ms.push_back(*together);
    one_by_one_ms.push_back(one_by_one);
  }
  const std::string shape =
      absl::StrCat(num_prompts, " x ", tokens.size(), " tokens ", engine.info().model_name);
  Row alone = MakeRow("prefill one by one", shape, one_by_one_ms, prompts.size(), tokens.size());
  Row batch = MakeRow("prefill as a batch", shape, together_ms, prompts.size(), tokens.size());
  batch.more.emplace_back("speedup", alone.median_ms / batch.median_ms);
  report->Add(std::move(alone));
  report->Add(std::move(batch));
  return absl::OkStatus();
}

}  // namespace prefilld::bench
