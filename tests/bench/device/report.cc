#include "tests/bench/device/report.h"

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace prefilld::bench {

void Report::Add(Row row) {
  absl::PrintF("%-34s %-28s %10.3f ms", row.what, row.shape, row.median_ms);
  if (row.tflop > 0) {
    const double rate = row.tflop / row.median_ms * 1e3;
    absl::PrintF("  %7.1f TFLOP/s", rate);
    if (ceilings_.tflops > 0) absl::PrintF(" %5.1f %%", 100 * rate / ceilings_.tflops);
  }
  if (row.gbytes > 0) {
    const double rate = row.gbytes / row.median_ms * 1e3;
    absl::PrintF("  %7.1f GB/s", rate);
    if (ceilings_.gbps > 0) absl::PrintF(" %5.1f %%", 100 * rate / ceilings_.gbps);
  }
  for (const auto& [name, value] : row.more) absl::PrintF("  %s %.4g", name, value);
  absl::PrintF("\n");
  std::fflush(stdout);
  rows_.push_back(std::move(row));
}

absl::Status Report::WriteJson(const std::string& path) const {
  nlohmann::ordered_json json;
  for (const auto& [name, value] : facts_) json[name] = value;
  json["peak_tflops"] = ceilings_.tflops;
  json["peak_gbps"] = ceilings_.gbps;
  json["rows"] = nlohmann::ordered_json::array();
  for (const Row& row : rows_) {
    nlohmann::ordered_json entry = {{"what", row.what},
                                    {"shape", row.shape},
                                    {"median_ms", row.median_ms},
                                    {"min_ms", row.min_ms},
                                    {"max_ms", row.max_ms}};
    if (row.tflop > 0) entry["tflops"] = row.tflop / row.median_ms * 1e3;
    if (row.gbytes > 0) entry["gbps"] = row.gbytes / row.median_ms * 1e3;
    for (const auto& [name, value] : row.more) entry[name] = value;
    json["rows"].push_back(std::move(entry));
  }
  std::ofstream file(path);
  file << json.dump(1) << "\n";
  if (!file.flush()) return absl::UnavailableError(absl::StrCat("cannot write ", path));
  return absl::OkStatus();
}

namespace {

void SetTimes(std::vector<double> times, Row* row) {
  std::sort(times.begin(), times.end());
  row->median_ms = times[times.size() / 2];
  row->min_ms = times.front();
  row->max_ms = times.back();
}

}  // namespace

absl::StatusOr<double> TimeMs(model::Device& device, absl::FunctionRef<absl::Status()> ops) {
  constexpr int kBegin = model::Device::kNumMarks - 2;
  constexpr int kEnd = model::Device::kNumMarks - 1;
  absl::Status status = device.Mark(kBegin);
  if (status.ok()) status = ops();
  if (status.ok()) status = device.Mark(kEnd);
  if (status.ok()) status = device.Synchronize();
  if (!status.ok()) return status;
  const absl::StatusOr<double> us = device.ElapsedUs(kBegin, kEnd);
  if (!us.ok()) return us.status();
  return *us * 1e-3;
}

absl::Status Measure(model::Device& device, int runs, absl::FunctionRef<absl::Status()> ops,
                     Row* row) {
  const Contender alone = {device, ops, row};
  return MeasureInTurns(runs, absl::MakeConstSpan(&alone, 1));
}

absl::Status MeasureInTurns(int runs, absl::Span<const Contender> contenders) {
  std::vector<std::vector<double>> times(contenders.size());
  for (int run = -2; run < runs; ++run) {
    for (size_t i = 0; i < contenders.size(); ++i) {
      const absl::StatusOr<double> ms = TimeMs(contenders[i].device, contenders[i].ops);
      if (!ms.ok()) return ms.status();
      if (run >= 0) times[i].push_back(*ms);
    }
  }
  for (size_t i = 0; i < contenders.size(); ++i) SetTimes(std::move(times[i]), contenders[i].row);
  return absl::OkStatus();
}

}  // namespace prefilld::bench
