#include <cstdio>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "client/cli/commands.h"
#include "client/cli/kv_bench.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"

namespace prefilld::client {

absl::Status RunBenchKv(const CliOptions& options, Cancellation& cancellation) {
  const KvBenchOptions& bench = options.kv_bench;
  PREFILLD_ASSIGN_OR_RETURN(const auto client,
                            PrefillClient::Create(options.channel, options.servers));
  PREFILLD_ASSIGN_OR_RETURN(
      const std::vector<MeasuredLanes> rows,
      MeasureKv(*client, bench.peer, bench.transfer_mb * 1'000'000, bench.runs, bench.lanes,
                {.deadline = absl::Now() + options.timeout,
                 .cancellation = &cancellation,
                 .metadata = options.metadata,
                 .resumable = true}));
  const nlohmann::json report = KvBenchReport(rows);
  std::printf("%s", options.json ? absl::StrCat(report.dump(2), "\n").c_str()
                                 : KvBenchTable(report).c_str());
  return absl::OkStatus();
}

}  // namespace prefilld::client
