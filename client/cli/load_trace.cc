#include "client/cli/load_trace.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <fstream>
#include <iterator>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "proto/status_macros.h"

namespace prefilld::client {
namespace {

constexpr std::array<absl::string_view, 6> kColumns = {"arrival_s",     "tokens", "prefix",
                                                       "prefix_tokens", "tenant", "priority"};
constexpr double kMaxArrivalSeconds = 1e7;
constexpr int kMaxPriority = 7;  // of the contract

// One line, by the names of its columns.
class Row {
 public:
  Row(const std::vector<std::string>& columns, absl::string_view line, size_t number)
      : columns_(columns), number_(number), fields_(absl::StrSplit(line, ',')) {
    for (absl::string_view& field : fields_) field = absl::StripAsciiWhitespace(field);
  }

  absl::Status CheckFields() const {
    if (fields_.size() != columns_.size()) {
      return Problem(
          absl::StrCat("has ", fields_.size(), " fields; the columns are ", columns_.size()));
    }
    for (const absl::string_view field : fields_) {
      if (absl::StrContains(field, '"')) {
        return Problem(absl::StrCat("field ", absl::CHexEscape(field), " has a quotation mark"));
      }
    }
    return absl::OkStatus();
  }

  absl::string_view Text(absl::string_view column) const {
    const auto at = std::find(columns_.begin(), columns_.end(), column);
    return at == columns_.end() ? absl::string_view()
                                : fields_[static_cast<size_t>(at - columns_.begin())];
  }

  // The value of an absent field is `absent`, or an error if there is none.
  absl::StatusOr<double> Number(absl::string_view column, double least, double most,
                                std::optional<double> absent) const {
    const absl::string_view text = Text(column);
    if (text.empty() && absent.has_value()) return *absent;
    double value;
    if (!absl::SimpleAtod(text, &value) || !(value >= least && value <= most)) {
      return Problem(absl::StrCat(column, " '", absl::CHexEscape(text), "' is no number from ",
                                  least, " to ", static_cast<int64_t>(most)));
    }
    return value;
  }
  absl::StatusOr<int64_t> Count(absl::string_view column, int64_t least, int64_t most,
                                std::optional<int64_t> absent) const {
    const absl::string_view text = Text(column);
    if (text.empty() && absent.has_value()) return *absent;
    int64_t value;
    if (!absl::SimpleAtoi(text, &value) || value < least || value > most) {
      return Problem(absl::StrCat(column, " '", absl::CHexEscape(text),
                                  "' is no whole number from ", least, " to ", most));
    }
    return value;
  }

  absl::Status Problem(absl::string_view what) const {
    return absl::InvalidArgumentError(absl::StrCat("line ", number_, ": ", what));
  }

 private:
  const std::vector<std::string>& columns_;
  const size_t number_;
  std::vector<absl::string_view> fields_;
};

absl::StatusOr<LoadRequest> ToRequest(const Row& row) {
  PREFILLD_RETURN_IF_ERROR(row.CheckFields());
  LoadRequest request;
  PREFILLD_ASSIGN_OR_RETURN(const double arrival_s,
                            row.Number("arrival_s", 0, kMaxArrivalSeconds, std::nullopt));
  request.arrival = absl::Seconds(arrival_s);
  PREFILLD_ASSIGN_OR_RETURN(request.num_tokens,
                            row.Count("tokens", 1, kMaxLoadTokens, std::nullopt));
  request.prefix = std::string(row.Text("prefix"));
  PREFILLD_ASSIGN_OR_RETURN(request.prefix_tokens,
                            row.Count("prefix_tokens", 0, request.num_tokens, 0));
  if (request.prefix.empty() != (request.prefix_tokens == 0)) {
    return row.Problem("prefix and prefix_tokens belong together");
  }
  request.tenant = std::string(row.Text("tenant"));
  PREFILLD_ASSIGN_OR_RETURN(const int64_t priority,
                            row.Count("priority", -kMaxPriority, kMaxPriority, 0));
  request.priority = static_cast<int>(priority);
  return request;
}

absl::Status CheckColumns(const std::vector<std::string>& columns, size_t line) {
  const auto problem = [line](absl::string_view what) {
    return absl::InvalidArgumentError(absl::StrCat("line ", line, ": ", what));
  };
  for (auto at = columns.begin(); at != columns.end(); ++at) {
    if (std::find(kColumns.begin(), kColumns.end(), *at) == kColumns.end()) {
      return problem(absl::StrCat("column '", absl::CHexEscape(*at), "' is not one of ",
                                  absl::StrJoin(kColumns, ", ")));
    }
    if (std::find(columns.begin(), at, *at) != at) {
      return problem(absl::StrCat("column ", *at, " is there twice"));
    }
  }
  for (const absl::string_view needed : {kColumns[0], kColumns[1]}) {
    if (std::find(columns.begin(), columns.end(), needed) == columns.end()) {
      return problem(absl::StrCat("there is no column ", needed));
    }
  }
  return absl::OkStatus();
}

// A sequence of numbers for each seed, the same everywhere (SplitMix64, Steele et al. 2014).
class Numbers {
 public:
  explicit Numbers(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t x = state_;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1p-53; }  // [0, 1)

 private:
  uint64_t state_;
};

// Makes a seed of a text (FNV-1a).
uint64_t SeedOf(absl::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace

absl::StatusOr<std::vector<LoadRequest>> ParseTrace(absl::string_view csv) {
  std::vector<LoadRequest> requests;
  std::vector<std::string> columns;
  size_t number = 0;
  for (absl::string_view line : absl::StrSplit(csv, '\n')) {
    ++number;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line.front() == '#') continue;
    if (columns.empty()) {
      for (const absl::string_view column : absl::StrSplit(line, ',')) {
        columns.emplace_back(absl::StripAsciiWhitespace(column));
      }
      PREFILLD_RETURN_IF_ERROR(CheckColumns(columns, number));
      continue;
    }
    const Row row(columns, line, number);
    PREFILLD_ASSIGN_OR_RETURN(LoadRequest request, ToRequest(row));
    if (!requests.empty() && request.arrival < requests.back().arrival) {
      return row.Problem(absl::StrCat("arrival_s ", row.Text("arrival_s"),
                                      " is before the one of the line above"));
    }
    if (requests.size() == kMaxLoadRequests) {
      return row.Problem(absl::StrCat("there are more than ", kMaxLoadRequests, " requests"));
    }
    requests.push_back(std::move(request));
  }
  if (requests.empty()) return absl::InvalidArgumentError("there are no requests");
  return requests;
}

absl::StatusOr<std::vector<LoadRequest>> ReadTrace(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file) return absl::InvalidArgumentError(absl::StrCat("cannot read ", path));
  auto requests = ParseTrace(text);
  if (requests.ok()) return requests;
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", requests.status().message()));
}

std::vector<LoadRequest> PoissonLoad(const std::vector<LoadRequest>& shapes, double per_second,
                                     size_t count, uint64_t seed) {
  Numbers numbers(seed);
  std::vector<LoadRequest> requests;
  requests.reserve(count);
  double arrival_s = 0;
  for (size_t i = 0; i < count; ++i) {
    LoadRequest& request = requests.emplace_back(shapes[i % shapes.size()]);
    arrival_s -= std::log1p(-numbers.Uniform()) / per_second;
    request.arrival = absl::Seconds(arrival_s);
  }
  return requests;
}

std::vector<LoadRequest> ShapeLoad(std::vector<LoadRequest> trace, const LoadShape& shape) {
  const size_t count =
      shape.num_requests > 0 ? static_cast<size_t>(shape.num_requests) : trace.size();
  if (shape.rate > 0) {
    trace = PoissonLoad(trace, shape.rate, count, shape.seed);
  } else {
    trace.resize(std::min(count, trace.size()));
  }
  for (LoadRequest& request : trace) request.arrival /= shape.speedup;
  return trace;
}

std::vector<uint32_t> TokensOf(const LoadRequest& request, size_t index, uint64_t seed,
                               uint32_t vocab_size) {
  std::vector<uint32_t> tokens(static_cast<size_t>(request.num_tokens));
  const auto own = tokens.begin() + request.prefix_tokens;
  const auto draw = [vocab_size](Numbers numbers) {
    return [numbers, vocab_size]() mutable {
      return static_cast<uint32_t>(numbers.Next() % vocab_size);
    };
  };
  const uint64_t base = Numbers(seed).Next();
  std::generate(tokens.begin(), own, draw(Numbers(base ^ SeedOf(request.prefix))));
  std::generate(own, tokens.end(), draw(Numbers(base + index)));
  return tokens;
}

}  // namespace prefilld::client
