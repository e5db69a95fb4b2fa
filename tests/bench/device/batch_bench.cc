#include <algorithm>
#include <chrono>

#include "absl/strings/str_cat.h"
#include "tests/bench/device/benches.h"

namespace prefilld::bench {
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
