// The soak: everything that happens to prefilld at once, for --seconds, with every answer compared
// byte by byte. Afterwards descriptors, threads, memory, gauges and answers are as they were.
//
//   soak --seconds=600
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/config.h"
#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"
#include "tests/integration/soak/known_answers.h"
#include "tests/integration/soak/load.h"
#include "tests/model/prompt_run.h"
#include "tests/model/random_checkpoint.h"

ABSL_FLAG(int, seconds, 20, "Time of the load.");

namespace prefilld::integration {
namespace {

constexpr absl::Duration kWarmUp = absl::Seconds(6);
constexpr absl::Duration kSettling = absl::Seconds(60);
constexpr int kLongPrompt = 3500;

// The process may keep so much more than after the warm-up: the allocator's arenas, and threads
// that gRPC starts when it has much to do and keeps for a while.
constexpr int64_t kMoreMemoryMb = 96;
constexpr int kMoreThreads = 8;
constexpr int kMoreDescriptors = 4;  // the port watch's own connection may be open

// The sanitizers keep memory that was freed, to notice whoever still uses it.
#if defined(ABSL_HAVE_ADDRESS_SANITIZER) || defined(ABSL_HAVE_THREAD_SANITIZER)
constexpr bool kFreedMemoryIsKept = true;
#else
constexpr bool kFreedMemoryIsKept = false;
#endif

int failures = 0;
void Expect(bool good, const std::string& what) {
  if (good) return;
  ++failures;
  std::fprintf(stderr, "FAILURE: %s\n", what.c_str());
}

// A folder that is removed with this object.
class Folder {
 public:
  Folder() {
    path_ = (std::filesystem::temp_directory_path() / "prefilld-soak-XXXXXX").string();
    if (mkdtemp(path_.data()) == nullptr) abort();
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string Write(const std::string& name, const std::string& content) const {
    const std::string path = path_ + "/" + name;
    std::ofstream(path) << content;
    return path;
  }

 private:
  std::string path_;
};

struct Holdings {
  int descriptors = 0;
  int threads = 0;
  int64_t memory_mb = 0;
};

int CountEntries(const std::string& folder) {
  return static_cast<int>(std::distance(std::filesystem::directory_iterator(folder),
                                        std::filesystem::directory_iterator()));
}

Holdings HoldingsOf(const ServerProcess& process) {
  const std::string proc = absl::StrCat("/proc/", process.pid());
  int64_t total_pages = 0, resident_pages = 0;
  std::ifstream(proc + "/statm") >> total_pages >> resident_pages;
  return {.descriptors = CountEntries(proc + "/fd"),
          .threads = CountEntries(proc + "/task"),
          .memory_mb = (resident_pages * sysconf(_SC_PAGESIZE)) >> 20};
}

// Waits until nothing is under way at prefilld. Returns the gauges that do not come down.
std::vector<std::string> Busy(const ServerProcess& prefilld) {
  std::vector<std::string> busy;
  WaitForMetrics(prefilld.metrics_address(), kSettling, [&busy](const MetricsPage& page) {
    busy.clear();
    for (const char* gauge :
         {"prefilld_live_requests", "prefilld_running_requests", "prefilld_queued_requests",
          "prefilld_queued_tokens", "prefilld_staged_bytes", "prefilld_requests_arriving",
          "prefilld_ended_requests_in_passes", "prefilld_computing"}) {
      if (page.Value(gauge) != 0) busy.push_back(absl::StrCat(gauge, "=", page.Value(gauge)));
    }
    return busy.empty();
  });
  return busy;
}

// Waits until the process holds no more than it did, and returns what it holds.
Holdings Settle(const ServerProcess& process, const Holdings& before) {
  Holdings now = HoldingsOf(process);
  const absl::Time until = absl::Now() + kSettling;
  while (absl::Now() < until && (now.descriptors > before.descriptors + kMoreDescriptors ||
                                 now.threads > before.threads + kMoreThreads)) {
    absl::SleepFor(absl::Milliseconds(200));
    now = HoldingsOf(process);
  }
  return now;
}

void Compare(const char* name, const Holdings& before, const Holdings& after) {
  std::printf("  %-24s %d -> %d descriptors, %d -> %d threads, %lld -> %lld MB\n", name,
              before.descriptors, after.descriptors, before.threads, after.threads,
              static_cast<long long>(before.memory_mb), static_cast<long long>(after.memory_mb));
  Expect(after.descriptors <= before.descriptors + kMoreDescriptors,
         absl::StrCat(name, " keeps descriptors"));
  Expect(after.threads <= before.threads + kMoreThreads, absl::StrCat(name, " keeps threads"));
  if (kFreedMemoryIsKept) {
    std::printf("  %-24s its memory is not checked: the sanitizer keeps what is freed\n", name);
  } else {
    Expect(after.memory_mb <= before.memory_mb + kMoreMemoryMb,
           absl::StrCat(name, " keeps memory"));
  }
}

void CheckAllAnswers(const LoadOptions& options, const KnownAnswers& known, Tally& tally) {
  const auto client = *client::PrefillClient::Create({.address = options.prefilld});
  for (size_t prompt = 0; prompt < known.size(); ++prompt) {
    tally.Count(
        "afterwards",
        known.Check(*client, {.prompt = prompt, .tenant = "a", .bypass_prefix_cache = true}));
  }
  for (size_t prompt = 0; prompt < options.generated.size(); ++prompt) {
    const auto tokens = AskWorker(options, known, prompt);
    Expect(tokens.ok() && *tokens == options.generated[prompt], "the worker answers otherwise");
  }
}

void CheckMetrics(const ServerProcess& prefilld) {
  const MetricsPage page(prefilld.metrics_address());
  for (const char* event : {"prefilld_requests_late_total", "prefilld_prefix_cache_hits_total",
                            "prefilld_prefix_cache_evicted_blocks_total",
                            "prefilld_requests_total{outcome=\"cancelled\"}",
                            "prefilld_requests_total{outcome=\"deadline\"}",
                            "prefilld_requests_total{outcome=\"receiver_failed\"}"}) {
    std::printf("  %-50s %.0f\n", event, page.Value(event));
    Expect(page.Value(event) > 0, absl::StrCat(event, ": the load did not bring it about"));
  }
  for (const char* fault : {"prefilld_device_errors_total", "prefilld_accept_errors_total",
                            "prefilld_requests_total{outcome=\"duplicate\"}"}) {
    Expect(page.Value(fault) == 0, absl::StrCat(fault, " is ", page.Value(fault)));
  }
}

model::ModelConfig Config() {
  model::ModelConfig config = model::SmallRandomConfig();
  config.num_layers = 6;
  config.max_positions = 4096;
  return config;
}

// Two processes that live through it all, and what they hold and answer.
class Soak {
 public:
  Soak()
      : checkpoint_(Config()),
        prefilld_(
            "prefilld",
            Flags({"--tenants=" + folder_.Write("tenants.json", kTenants), "--tenant_from=metadata",
                   "--deliver_to_allow=127.0.0.1:*", "--frame_bytes=1048576",
                   "--staging_bytes=8388608", "--queue_capacity=24", "--max_connections=500",
                   "--min_consumer_mb_per_s=1", "--prefix_cache_bytes=16777216"})),
        worker_flags_(Flags({"--prefill_address=" + prefilld_.address(), "--lanes=2",
                             "--kv_pool_tokens=16384", "--transfer_timeout_s=60"})),
        worker_("prefilld-decode-worker", worker_flags_),
        known_(prefilld_.address(), Config().vocab_size),
        load_{.prefilld = prefilld_.address(),
              .prefilld_metrics = prefilld_.metrics_address(),
              .worker = worker_.address(),
              .worker_flags = worker_flags_,
              .prompt_file = folder_.Write(
                  "prompt",
                  absl::StrJoin(model::RandomTokens(kLongPrompt, Config().vocab_size, 77), ",")),
              .generated = {}} {
    for (size_t prompt = 0; prompt < kShortPrompts; ++prompt) {
      load_.generated.push_back(AskWorker(load_, known_, prompt).value());
    }
  }

  // Brings everything that is kept into being, such as threads of gRPC and the prefix cache, and
  // notes what the processes hold then.
  void WarmUp() {
    RunLoad(load_, known_, kWarmUp, tally_);
    ExpectNothingUnderWay();
    absl::SleepFor(absl::Seconds(1));
    prefilld_before_ = HoldingsOf(prefilld_);
    worker_before_ = HoldingsOf(worker_);
  }

  void Run(absl::Duration time) {
    RunLoad(load_, known_, time, tally_);
    ExpectNothingUnderWay();
    CheckAllAnswers(load_, known_, tally_);
    std::printf("who and how it ended, within %s:\n", absl::FormatDuration(time).c_str());
    tally_.Print();
    std::printf("  %lld bytes of KV compared with known ones\n",
                static_cast<long long>(known_.compared_bytes()));
    Compare("prefilld", prefilld_before_, Settle(prefilld_, prefilld_before_));
    Compare("prefilld-decode-worker", worker_before_, Settle(worker_, worker_before_));
    CheckMetrics(prefilld_);
  }

  // Returns whether all was as it should be.
  bool End() {
    for (ServerProcess* process : {&worker_, &prefilld_}) {
      process->Signal(SIGTERM);
      Expect(process->Wait(absl::Seconds(30)) == 0, "a process does not end well");
    }
    const int64_t all = failures + tally_.failures();
    std::printf("%lld failures\n", static_cast<long long>(all));
    if (all > 0) std::fprintf(stderr, "%s", prefilld_.stderr_text().substr(0, 20'000).c_str());
    return all == 0;
  }

 private:
  static constexpr char kTenants[] =
      R"({"tenants": [{"name": "a"}, {"name": "known"}, {"name": "b", "max_requests": 12}]})";

  std::vector<std::string> Flags(std::vector<std::string> more) const {
    more.insert(more.begin(), {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=1",
                               "--stall_timeout_s=3"});
    return more;
  }

  void ExpectNothingUnderWay() {
    const std::vector<std::string> busy = Busy(prefilld_);
    Expect(busy.empty(), absl::StrCat("gauges do not come down: ", absl::StrJoin(busy, ", ")));
  }

  const Folder folder_;
  const model::RandomCheckpoint checkpoint_;
  ServerProcess prefilld_;
  const std::vector<std::string> worker_flags_;
  ServerProcess worker_;
  const KnownAnswers known_;
  LoadOptions load_;
  Tally tally_;
  Holdings prefilld_before_, worker_before_;
};

}  // namespace
}  // namespace prefilld::integration

int main(int argc, char** argv) {
  absl::ParseCommandLine(argc, argv);
  signal(SIGPIPE, SIG_IGN);
  prefilld::integration::Soak soak;
  soak.WarmUp();
  soak.Run(absl::Seconds(absl::GetFlag(FLAGS_seconds)));
  return soak.End() ? EXIT_SUCCESS : EXIT_FAILURE;
}
