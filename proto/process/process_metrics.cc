#include "proto/process/process_metrics.h"

#include <dirent.h>
#include <sys/resource.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <fstream>
#include <optional>
#include <string>
#include <vector>

#include <prometheus/collectable.h>
#include <prometheus/metric_family.h>

namespace prefilld::process {
namespace {

std::optional<double> ResidentBytes() {
  std::ifstream file("/proc/self/statm");
  double all = 0, resident = 0;
  if (!(file >> all >> resident)) return std::nullopt;
  return resident * static_cast<double>(sysconf(_SC_PAGESIZE));
}

std::optional<double> MaxDescriptors() {
  rlimit limit = {};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0) return std::nullopt;
  return static_cast<double>(limit.rlim_cur);
}

// The folder takes a descriptor itself, which does not count; if there is none for it, all are in
// use.
std::optional<double> OpenDescriptors() {
  DIR* folder = opendir("/proc/self/fd");
  if (folder == nullptr) return errno == EMFILE ? MaxDescriptors() : std::nullopt;
  int count = -1;
  while (const dirent* entry = readdir(folder)) {
    if (entry->d_name[0] != '.') ++count;
  }
  closedir(folder);
  return count;
}

std::optional<double> CpuSeconds() {
  rusage use = {};
  if (getrusage(RUSAGE_SELF, &use) != 0) return std::nullopt;
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) * 1e-6;
  };
  return seconds(use.ru_utime) + seconds(use.ru_stime);
}

// The start is counted from the boot, whose time is in /proc/stat.
std::optional<double> StartSeconds() {
  std::string stat;
  if (!std::getline(std::ifstream("/proc/self/stat"), stat)) return std::nullopt;
  // The second field is the program's name in parentheses, which may hold blanks; the start is the
  // twentieth behind it.
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return std::nullopt;
  const char* field = stat.c_str() + name_end + 1;
  for (int i = 0; i < 19; ++i) {
    while (*field == ' ') ++field;
    while (*field != ' ' && *field != '\0') ++field;
  }
  const double ticks = std::strtod(field, nullptr);
  std::ifstream file("/proc/stat");
  for (std::string word; file >> word;) {
    double boot = 0;
    if (word == "btime" && file >> boot) {
      return boot + ticks / static_cast<double>(sysconf(_SC_CLK_TCK));
    }
  }
  return std::nullopt;
}

struct Figure {
  const char* name;
  const char* help;
  prometheus::MetricType type;
  std::optional<double> (*read)();
};
constexpr Figure kFigures[] = {
    {"process_resident_memory_bytes", "Memory of the process that is in RAM.",
     prometheus::MetricType::Gauge, ResidentBytes},
    {"process_open_fds", "File descriptors in use.", prometheus::MetricType::Gauge,
     OpenDescriptors},
    {"process_max_fds", "File descriptors that may be in use.", prometheus::MetricType::Gauge,
     MaxDescriptors},
    {"process_cpu_seconds_total", "Time that the cores worked for the process.",
     prometheus::MetricType::Counter, CpuSeconds},
    {"process_start_time_seconds", "Start of the process, in seconds since 1970.",
     prometheus::MetricType::Gauge, StartSeconds}};

class ProcessFigures : public prometheus::Collectable {
 public:
  std::vector<prometheus::MetricFamily> Collect() const override {
    std::vector<prometheus::MetricFamily> families;
    for (const Figure& figure : kFigures) {
      const std::optional<double> value = figure.read();
      if (!value.has_value()) continue;
      prometheus::ClientMetric metric;
      if (figure.type == prometheus::MetricType::Counter) {
        metric.counter.value = *value;
      } else {
        metric.gauge.value = *value;
      }
      families.push_back(
          {.name = figure.name, .help = figure.help, .type = figure.type, .metric = {metric}});
    }
    return families;
  }
};

}  // namespace

std::shared_ptr<prometheus::Collectable> ProcessMetrics() {
  return std::make_shared<ProcessFigures>();
}

}  // namespace prefilld::process
