#include <algorithm>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cli/commands.h"
#include "client/cli/load_report.h"
#include "client/cli/load_run.h"
#include "client/cli/load_trace.h"
#include "client/cli/progress_line.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

constexpr absl::Duration kInfoTimeout = absl::Seconds(10);

absl::StatusOr<std::vector<LoadRequest>> MakeLoad(const CliOptions& options) {
  const BenchOptions& bench = options.bench;
  std::vector<LoadRequest> requests = {
      {.num_tokens = bench.prompt_tokens, .priority = options.priority}};
  if (!bench.trace.empty()) {
    PREFILLD_ASSIGN_OR_RETURN(requests, ReadTrace(bench.trace));
  }
  return ShapeLoad(std::move(requests), {.rate = bench.rate,
                                         .speedup = bench.speedup,
                                         .num_requests = bench.num_requests,
                                         .seed = options.sampling.seed()});
}

absl::Status CheckLengths(const std::vector<LoadRequest>& requests, int64_t max_tokens) {
  for (const LoadRequest& request : requests) {
    if (request.num_tokens <= max_tokens) continue;
    return absl::InvalidArgumentError(absl::StrCat(
        "a request of ", request.num_tokens, " tokens; the server takes at most ", max_tokens));
  }
  return absl::OkStatus();
}

LoadOptions MakeLoadOptions(const CliOptions& options, uint32_t vocab_size) {
  LoadOptions load;
  *load.request.mutable_layout() = options.layout;
  *load.request.mutable_sampling() = options.sampling;
  *load.request.mutable_attention() = options.attention;
  *load.request.mutable_prefix_cache() = options.prefix_cache;
  load.last_blocks = options.bench.last_blocks;
  load.metadata = options.metadata;
  load.tenant_key = options.bench.tenant_key;
  load.timeout = options.timeout;
  load.max_in_flight = options.bench.max_in_flight;
  load.seed = options.sampling.seed();
  load.vocab_size = vocab_size;
  return load;
}

std::string ProgressText(const LoadProgress& progress) {
  std::string text = absl::StrFormat("%.0f s: %d of %d sent, %d in flight, %d failed",
                                     absl::ToDoubleSeconds(progress.time), progress.sent,
                                     progress.requests, progress.in_flight, progress.failed);
  if (progress.first_token_p50_ms > 0) {
    absl::StrAppend(
        &text, absl::StrFormat("; first token p50 %.0f ms, p99 %.0f", progress.first_token_p50_ms,
                               progress.first_token_p99_ms));
  }
  return text;
}

}  // namespace

absl::Status RunBench(const CliOptions& options, Cancellation& cancellation) {
  PREFILLD_ASSIGN_OR_RETURN(const std::vector<LoadRequest> requests, MakeLoad(options));
  std::vector<std::unique_ptr<PrefillClient>> clients;
  for (uint32_t i = 0; i < std::max(options.lanes, 1u); ++i) {
    PREFILLD_ASSIGN_OR_RETURN(auto client, PrefillClient::Create(options.channel, options.servers));
    clients.push_back(std::move(client));
  }
  PREFILLD_ASSIGN_OR_RETURN(
      const auto info, clients.front()->GetServerInfo(std::min(options.timeout, kInfoTimeout)));
  PREFILLD_RETURN_IF_ERROR(CheckLengths(requests, info.max_prompt_tokens()));

  ProgressLine line(!options.quiet);
  auto outcome = RunLoad(requests, clients, MakeLoadOptions(options, info.vocab_size()),
                         cancellation, [&line](const LoadProgress& progress) {
                           line.Show([&progress] { return ProgressText(progress); });
                         });
  line.Clear();
  PREFILLD_RETURN_IF_ERROR(outcome.status());
  nlohmann::json report = LoadReport(outcome->ends, outcome->sender);
  if (options.bench.each) report["each"] = EachRequest(outcome->ends);
  std::printf("%s", options.json ? absl::StrCat(report.dump(2), "\n").c_str()
                                 : LoadSummary(report).c_str());
  return absl::OkStatus();
}

}  // namespace prefilld::client
