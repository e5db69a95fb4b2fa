// The rows of a benchmark: printed as they come, written as JSON at the end.
#ifndef PREFILLD_TESTS_BENCH_DEVICE_REPORT_H_
#define PREFILLD_TESTS_BENCH_DEVICE_REPORT_H_

#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "model/device/device.h"

namespace prefilld::bench {

// The ceilings of the machine, from --peak_tflops and --peak_gbps. 0: unknown, so no percentage is
// printed.
struct Ceilings {
  double tflops = 0.0;
  double gbps = 0.0;
};

struct Row {
  std::string what;
  std::string shape = {};
  double median_ms = 0.0;
  double min_ms = 0.0;
  double max_ms = 0.0;
  double tflop = 0.0;   // useful work of one run, 10^12 operations; 0: memory-bound
  double gbytes = 0.0;  // least traffic of one run, 10^9 bytes; 0: compute-bound
  std::vector<std::pair<std::string, double>> more = {};
};

class Report {
 public:
  explicit Report(const Ceilings& ceilings) : ceilings_(ceilings) {}

  void Add(Row row);  // prints it
  // Adds a fact about the run, such as device, model or commit.
  void Fact(const std::string& name, const std::string& value) { facts_.push_back({name, value}); }
  absl::Status WriteJson(const std::string& path) const;

 private:
  const Ceilings ceilings_;
  std::vector<Row> rows_;
  std::vector<std::pair<std::string, std::string>> facts_;
};

// Runs `ops`, waits for them, and returns the milliseconds they took by the device's clock. Uses
// the last two marks of the device.
absl::StatusOr<double> TimeMs(model::Device& device, absl::FunctionRef<absl::Status()> ops);

// Runs `ops` twice to warm up, then `runs` times timed. Fills median, min and max of `row`.
absl::Status Measure(model::Device& device, int runs, absl::FunctionRef<absl::Status()> ops,
                     Row* row);

// One of several ways to do the same work. `ops` runs it on `device`.
struct Contender {
  model::Device& device;
  absl::FunctionRef<absl::Status()> ops;
  Row* row;
};

// Measures all contenders in turns, so that a card that slows down as it warms up does so for each.
absl::Status MeasureInTurns(int runs, absl::Span<const Contender> contenders);

}  // namespace prefilld::bench

#endif  // PREFILLD_TESTS_BENCH_DEVICE_REPORT_H_
