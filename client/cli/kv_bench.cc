#include "client/cli/kv_bench.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "client/lane_choice.h"
#include "nlohmann/json.hpp"
#include "proto/status_macros.h"
#include "proto/wire/bench_peer.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {
namespace {

using nlohmann::json;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillResult;

constexpr absl::Duration kInfoTimeout = absl::Seconds(10);
constexpr int64_t kTcpPieceBytes = int64_t{2} << 20;  // of a frame

// A pool with a place for every block of a transfer, K and V apart as a decode worker has them. Its
// memory is there before anything is measured.
class Pool : public KvSink {
 public:
  explicit Pool(int64_t bytes) : keys_(bytes / 2, 1), values_(bytes / 2, 1) {}

  absl::Status OnAccepted(const ::prefill::v1::Accepted& accepted) override {
    block_bytes_ = wire::KvTensorBytes(accepted.layout());
    num_blocks_ = accepted.layout().num_blocks();
    const size_t bytes = block_bytes_ * num_blocks_ * accepted.layout().num_layers();
    if (bytes <= keys_.size()) return absl::OkStatus();
    return absl::InternalError(absl::StrCat("a pool of ", keys_.size(), " bytes for ", bytes));
  }
  absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
  void OnSharedMemory(const absl::Status& attached) override { is_shared_ = attached.ok(); }
  absl::Status OnFrame(const wire::ReceivedFrame& frame) override {
    const size_t place = (frame.layer * num_blocks_ + frame.first_block) * block_bytes_;
    const size_t bytes = frame.payload.size() / 2;
    Copy(frame.payload.Part(0, bytes), keys_.data() + place);
    Copy(frame.payload.Part(bytes, bytes), values_.data() + place);
    return absl::OkStatus();
  }
  // Whether the latest transfer came in shared memory.
  bool is_shared() const { return is_shared_; }

 private:
  static void Copy(const std::vector<absl::Span<const uint8_t>>& pieces, uint8_t* place) {
    for (const auto& piece : pieces) {
      std::memcpy(place, piece.data(), piece.size());
      place += piece.size();
    }
  }

  std::vector<uint8_t> keys_, values_;
  size_t block_bytes_ = 0;
  size_t num_blocks_ = 0;
  bool is_shared_ = false;
};

// Measures what `transfer` does; it returns the bytes that came, and perhaps how long they took.
absl::StatusOr<MeasuredTransfer> Measure(
    const std::string& peer, absl::FunctionRef<absl::StatusOr<MeasuredTransfer>()> transfer) {
  PREFILLD_ASSIGN_OR_RETURN(const wire::ProcessUse there, wire::AskUse(peer));
  const wire::ProcessUse here = wire::UseOfThisProcess();
  PREFILLD_ASSIGN_OR_RETURN(MeasuredTransfer measured, transfer());
  const wire::ProcessUse here_then = wire::UseOfThisProcess();
  PREFILLD_ASSIGN_OR_RETURN(const wire::ProcessUse there_then, wire::AskUse(peer));
  measured.cpu_s_here = 1e-6 * static_cast<double>(here_then.cpu_us - here.cpu_us);
  measured.cpu_s_there = 1e-6 * static_cast<double>(there_then.cpu_us - there.cpu_us);
  measured.page_faults_here = here_then.page_faults - here.page_faults;
  measured.page_faults_there = there_then.page_faults - there.page_faults;
  return measured;
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0.0;
  std::sort(values.begin(), values.end());
  const size_t middle = values.size() / 2;
  return values.size() % 2 == 1 ? values[middle] : (values[middle - 1] + values[middle]) / 2;
}

json Medians(const std::vector<MeasuredTransfer>& transfers) {
  const auto median = [&transfers](double (*of)(const MeasuredTransfer&)) {
    std::vector<double> values;
    for (const MeasuredTransfer& transfer : transfers) values.push_back(of(transfer));
    return Median(std::move(values));
  };
  json object;
  object["gb_per_s"] = median([](const MeasuredTransfer& t) { return 1e-9 * t.bytes / t.seconds; });
  object["cpu_s_per_gb_here"] =
      median([](const MeasuredTransfer& t) { return t.cpu_s_here / (1e-9 * t.bytes); });
  object["cpu_s_per_gb_there"] =
      median([](const MeasuredTransfer& t) { return t.cpu_s_there / (1e-9 * t.bytes); });
  object["page_faults_per_mb_here"] =
      median([](const MeasuredTransfer& t) { return t.page_faults_here / (1e-6 * t.bytes); });
  object["page_faults_per_mb_there"] =
      median([](const MeasuredTransfer& t) { return t.page_faults_there / (1e-6 * t.bytes); });
  object["gb_per_s_of_runs"] = json::array();
  for (const MeasuredTransfer& t : transfers) {
    object["gb_per_s_of_runs"].push_back(1e-9 * t.bytes / t.seconds);
  }
  return object;
}

}  // namespace

absl::StatusOr<std::vector<MeasuredLanes>> MeasureKv(PrefillClient& client, const std::string& peer,
                                                     int64_t bytes, int runs,
                                                     const std::vector<uint32_t>& lanes,
                                                     const PrefillCallOptions& options) {
  PREFILLD_ASSIGN_OR_RETURN(const auto info, client.GetServerInfo(kInfoTimeout));
  if (info.model_fingerprint() != wire::kKvBenchFingerprint) {
    return absl::FailedPreconditionError(
        absl::StrCat("the server has the model ", info.model_name(),
                     "; bench-kv measures prefilld --kv_bench_listen, which has none"));
  }
  const int64_t block_bytes =
      static_cast<int64_t>(KvBytesPerToken(info, {})) * wire::kDefaultBlockTokens;
  const int64_t most_blocks = info.max_prompt_tokens() / wire::kDefaultBlockTokens;
  if (block_bytes < 1 || most_blocks < 1) {
    return absl::FailedPreconditionError("the server has no KV, or no room for a block of it");
  }
  const int64_t num_blocks = std::clamp<int64_t>(bytes / block_bytes, 1, most_blocks);
  PrefillRequest request;
  request.mutable_token_ids()->Resize(static_cast<int>(num_blocks * wire::kDefaultBlockTokens), 1);
  Pool pool(num_blocks * block_bytes);

  PrefillCallOptions call = options;
  const auto fetch_kv = [&]() -> absl::StatusOr<MeasuredTransfer> {
    const absl::Time begin = absl::Now();
    PREFILLD_ASSIGN_OR_RETURN(const PrefillResult result, client.Prefill(request, pool, call));
    return MeasuredTransfer{.bytes = static_cast<int64_t>(result.kv_bytes()),
                            .seconds = absl::ToDoubleSeconds(absl::Now() - begin)};
  };
  const auto fetch_bare = [&]() -> absl::StatusOr<MeasuredTransfer> {
    const int connections = static_cast<int>(request.num_lanes());
    PREFILLD_ASSIGN_OR_RETURN(
        const double seconds,
        wire::ReceiveOverTcp(peer, num_blocks * block_bytes, connections, kTcpPieceBytes));
    return MeasuredTransfer{.bytes = num_blocks * block_bytes, .seconds = seconds};
  };
  PREFILLD_RETURN_IF_ERROR(fetch_kv().status());  // tells whether shared memory can be reached
  std::vector<MeasuredLanes> rows;
  for (const uint32_t number : lanes) rows.push_back({.lanes = number, .transport = "grpc"});
  for (const uint32_t number : pool.is_shared() ? lanes : std::vector<uint32_t>()) {
    rows.push_back({.lanes = number, .transport = "shared"});
  }
  for (int run = -1; run < runs; ++run) {
    for (MeasuredLanes& row : rows) {
      request.set_num_lanes(row.lanes);
      call.shared_memory = row.transport == "shared";
      PREFILLD_ASSIGN_OR_RETURN(const MeasuredTransfer kv, Measure(peer, fetch_kv));
      PREFILLD_ASSIGN_OR_RETURN(const MeasuredTransfer tcp, Measure(peer, fetch_bare));
      if (call.shared_memory && !pool.is_shared()) {
        return absl::UnavailableError("a transfer did not get its shared memory");
      }
      if (run < 0) continue;  // connections and memory are new
      row.kv.push_back(kv);
      row.tcp.push_back(tcp);
    }
  }
  return rows;
}

json KvBenchReport(const std::vector<MeasuredLanes>& rows) {
  json report;
  report["transfer_bytes"] = rows.empty() || rows[0].kv.empty() ? 0 : rows[0].kv[0].bytes;
  report["lanes"] = json::array();
  for (const MeasuredLanes& row : rows) {
    report["lanes"].push_back({{"lanes", row.lanes},
                               {"transport", row.transport},
                               {"kv", Medians(row.kv)},
                               {"tcp", Medians(row.tcp)}});
  }
  return report;
}

std::string KvBenchTable(const json& report) {
  std::string table = absl::StrFormat(
      "%.2f GB a transfer, medians; CPU in seconds a GB of this end + the server's, faults a MB\n"
      "%5s  %-9s %9s  %-11s %-9s | %8s  %s\n",
      1e-9 * report["transfer_bytes"].get<double>(), "lanes", "transport", "KV GB/s", "CPU",
      "faults", "TCP GB/s", "CPU");
  for (const json& row : report["lanes"]) {
    const json &kv = row["kv"], &tcp = row["tcp"];
    const auto pair = [](const json& of, const char* name, int digits) {
      return absl::StrFormat("%.*f + %.*f", digits, of[absl::StrCat(name, "_here")].get<double>(),
                             digits, of[absl::StrCat(name, "_there")].get<double>());
    };
    absl::StrAppendFormat(&table, "%5d  %-9s %9.2f  %-11s %-9s | %8.2f  %s\n",
                          row["lanes"].get<int>(), row["transport"].get<std::string>(),
                          kv["gb_per_s"].get<double>(), pair(kv, "cpu_s_per_gb", 2),
                          pair(kv, "page_faults_per_mb", 0), tcp["gb_per_s"].get<double>(),
                          pair(tcp, "cpu_s_per_gb", 2));
  }
  return table;
}

}  // namespace prefilld::client
