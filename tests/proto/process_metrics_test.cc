#include "proto/process/process_metrics.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>
#include <sys/resource.h>
#include <unistd.h>

#include <map>
#include <string>
#include <vector>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace prefilld::process {
namespace {

std::map<std::string, double> Read() {
  std::map<std::string, double> values;
  for (const prometheus::MetricFamily& family : ProcessMetrics()->Collect()) {
    const prometheus::ClientMetric& metric = family.metric.at(0);
    values[family.name] =
        family.type == prometheus::MetricType::Counter ? metric.counter.value : metric.gauge.value;
  }
  return values;
}

TEST(ProcessMetrics, AreThoseOfThisProcess) {
  auto values = Read();
  EXPECT_EQ(values.size(), 5);
  EXPECT_GT(values.at("process_resident_memory_bytes"), 1e6);
  EXPECT_GE(values.at("process_cpu_seconds_total"), 0);
  const double now = absl::ToDoubleSeconds(absl::Now() - absl::UnixEpoch());
  EXPECT_LT(values.at("process_start_time_seconds"), now + 2);
  EXPECT_GT(values.at("process_start_time_seconds"), now - 3600);

  const std::vector<char> memory(64 << 20, 'x');
  EXPECT_GT(Read().at("process_resident_memory_bytes"),
            values.at("process_resident_memory_bytes") + (32 << 20));
  EXPECT_EQ(memory.back(), 'x');
}

TEST(ProcessMetrics, DescriptorsAreCountedEvenWhenNoneIsLeft) {
  const double before = Read().at("process_open_fds");
  rlimit limit = {};
  getrlimit(RLIMIT_NOFILE, &limit);
  const rlimit before_limit = limit;
  limit.rlim_cur = 64;
  setrlimit(RLIMIT_NOFILE, &limit);
  std::vector<int> open;
  open.push_back(fcntl(0, F_DUPFD_CLOEXEC, 0));
  EXPECT_EQ(Read().at("process_open_fds"), before + 1);
  EXPECT_EQ(Read().at("process_max_fds"), 64);
  for (int fd; (fd = fcntl(0, F_DUPFD_CLOEXEC, 0)) >= 0;) open.push_back(fd);
  EXPECT_EQ(Read().at("process_open_fds"), 64);
  for (const int fd : open) close(fd);
  setrlimit(RLIMIT_NOFILE, &before_limit);
}

}  // namespace
}  // namespace prefilld::process
