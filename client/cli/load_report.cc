#include "client/cli/load_report.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace prefilld::client {
namespace {

using ::nlohmann::json;

constexpr struct {
  const char* name;
  double share;
} kPercentiles[] = {{"p50", 0.5}, {"p90", 0.9}, {"p95", 0.95}, {"p99", 0.99}, {"max", 1.0}};

// The bounds of the groups of lengths.
constexpr int64_t kLengths[] = {1024, 4096, 16384, 65536};

using Ends = std::vector<const LoadEnd*>;
using TimeOf = std::optional<absl::Duration> (*)(const LoadEnd&);

constexpr struct {
  const char* name;
  TimeOf of;
} kTimes[] = {{"first_token_ms", [](const LoadEnd& end) { return end.first_token; }},
              {"last_block_ms", [](const LoadEnd& end) { return end.last_block; }},
              {"result_ms", [](const LoadEnd& end) { return end.result; }}};

// Microseconds are precise enough to read.
double Rounded(double value) { return std::round(value * 1e3) / 1e3; }

json Distribution(const Ends& ends, TimeOf of) {
  std::vector<double> values;
  for (const LoadEnd* end : ends) {
    if (const auto time = of(*end)) values.push_back(absl::ToDoubleMilliseconds(*time));
  }
  json object = {{"count", values.size()}};
  if (values.empty()) return object;
  std::sort(values.begin(), values.end());
  double sum = 0;
  for (const double value : values) sum += value;
  object["mean"] = Rounded(sum / static_cast<double>(values.size()));
  for (const auto& [name, share] : kPercentiles) object[name] = Rounded(Percentile(values, share));
  return object;
}

json Group(const Ends& ends) {
  json object = {{"requests", ends.size()}, {"ends", json::object()}};
  int64_t tokens = 0, cached_tokens = 0, kv_bytes = 0;
  for (const LoadEnd* end : ends) {
    json& count = object["ends"][absl::StatusCodeToString(end->code)];
    count = count.is_null() ? 1 : count.get<int64_t>() + 1;
    tokens += end->request.num_tokens;
    cached_tokens += end->cached_tokens;
    kv_bytes += end->kv_bytes;
  }
  object["tokens"] = tokens;
  object["cached_tokens"] = cached_tokens;
  object["kv_bytes"] = kv_bytes;
  for (const auto& [name, of] : kTimes) object[name] = Distribution(ends, of);
  return object;
}

json Groups(const Ends& ends, const std::function<std::string(const LoadRequest&)>& name_of) {
  std::map<std::string, Ends> groups;
  for (const LoadEnd* end : ends) groups[name_of(end->request)].push_back(end);
  json object = json::object();
  for (const auto& [name, members] : groups) object[name] = Group(members);
  return object;
}

constexpr char kLonger[] = "more";
std::string UpTo(int64_t bound) { return absl::StrCat("up to ", bound); }

std::string LengthClass(const LoadRequest& request) {
  for (const int64_t bound : kLengths) {
    if (request.num_tokens <= bound) return UpTo(bound);
  }
  return kLonger;
}

json Rates(const Ends& ends, absl::Duration time) {
  double tokens = 0;
  for (const LoadEnd* end : ends) tokens += static_cast<double>(end->request.num_tokens);
  const double seconds = absl::ToDoubleSeconds(time);
  if (!(seconds > 0)) return {{"requests_per_s", 0}, {"tokens_per_s", 0}};
  return {{"requests_per_s", Rounded(static_cast<double>(ends.size()) / seconds)},
          {"tokens_per_s", Rounded(tokens / seconds)}};
}

std::string TimesLine(const char* label, const json& times) {
  if (times["count"] == 0) return absl::StrFormat("%-12s none\n", label);
  return absl::StrFormat("%-12s mean %.1f ms, p50 %.1f, p90 %.1f, p99 %.1f, longest %.1f\n", label,
                         times["mean"].get<double>(), times["p50"].get<double>(),
                         times["p90"].get<double>(), times["p99"].get<double>(),
                         times["max"].get<double>());
}

}  // namespace

double Percentile(const std::vector<double>& sorted, double share) {
  const double rank = std::ceil(share * static_cast<double>(sorted.size()));
  const auto position = static_cast<size_t>(std::max(rank, 1.0)) - 1;
  return sorted[std::min(position, sorted.size() - 1)];
}

json LoadReport(const std::vector<LoadEnd>& ends, const LoadSender& sender) {
  Ends all, done;
  absl::Duration last_arrival, last_end;
  for (const LoadEnd& end : ends) {
    all.push_back(&end);
    if (end.code == absl::StatusCode::kOk) done.push_back(&end);
    last_arrival = std::max(last_arrival, end.request.arrival);
    last_end = std::max(last_end, end.request.arrival + end.ended);
  }
  json report = Group(all);
  report["seconds"] = Rounded(absl::ToDoubleSeconds(last_end));
  report["offered"] = Rates(all, last_arrival);
  report["done"] = Rates(done, last_end);
  report["by_length"] = Groups(all, LengthClass);
  report["by_tenant"] = Groups(all, [](const LoadRequest& request) { return request.tenant; });
  report["by_priority"] =
      Groups(all, [](const LoadRequest& request) { return absl::StrCat(request.priority); });
  report["sender"] = {
      {"late_ms", Distribution(all, [](const LoadEnd& end) { return std::optional(end.late); })},
      {"max_in_flight", sender.max_in_flight},
      {"most_in_flight", sender.most_in_flight},
      {"held_back", sender.held_back}};
  return report;
}

json EachRequest(const std::vector<LoadEnd>& ends) {
  json each = json::array();
  for (const LoadEnd& end : ends) {
    each.push_back({{"tokens", end.request.num_tokens}, {"first_token_ms", nullptr}});
    if (end.first_token.has_value()) {
      each.back()["first_token_ms"] = Rounded(absl::ToDoubleMilliseconds(*end.first_token));
    }
  }
  return each;
}

std::string LoadSummary(const json& report) {
  std::string text = absl::StrFormat(
      "%-12s %d in %.1f s; offered %.2f a second (%.0f tokens), done %.2f (%.0f)\n", "requests",
      report["requests"].get<int64_t>(), report["seconds"].get<double>(),
      report["offered"]["requests_per_s"].get<double>(),
      report["offered"]["tokens_per_s"].get<double>(),
      report["done"]["requests_per_s"].get<double>(), report["done"]["tokens_per_s"].get<double>());
  std::string statuses;
  for (const auto& [name, count] : report["ends"].items()) {
    absl::StrAppend(&statuses, statuses.empty() ? "" : ", ", name, " ", count.get<int64_t>());
  }
  absl::StrAppend(&text, absl::StrFormat("%-12s %s\n", "ends", statuses),
                  TimesLine("first token", report["first_token_ms"]),
                  TimesLine("last block", report["last_block_ms"]),
                  TimesLine("result here", report["result_ms"]));
  std::vector<std::string> lengths;
  for (const int64_t bound : kLengths) lengths.push_back(UpTo(bound));
  lengths.emplace_back(kLonger);
  for (const std::string& name : lengths) {
    const auto group = report["by_length"].find(name);
    if (group == report["by_length"].end()) continue;
    absl::StrAppend(&text, TimesLine(name.c_str(), (*group)["first_token_ms"]));
  }
  const json& sender = report["sender"];
  absl::StrAppend(
      &text, TimesLine("sent late", sender["late_ms"]),
      absl::StrFormat("%-12s at most %d of %d at a time; %d held back\n", "in flight",
                      sender["most_in_flight"].get<int64_t>(),
                      sender["max_in_flight"].get<int64_t>(), sender["held_back"].get<int64_t>()));
  return text;
}

}  // namespace prefilld::client
