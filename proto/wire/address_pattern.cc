#include "proto/wire/address_pattern.h"

#include <arpa/inet.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "proto/wire/host_port.h"

namespace prefilld::wire {
namespace {

using Ipv6Groups = std::array<std::optional<uint16_t>, 8>;  // nullopt: any

struct Pattern {
  enum class Kind { kIpv4, kIpv6, kName, kUnix };

  Kind kind = Kind::kName;
  std::vector<std::string> labels;  // of an IPv4 pattern, a name, or a path
  Ipv6Groups groups;
  std::optional<int> port;  // nullopt: any
};

bool HasStar(absl::string_view text) { return absl::StrContains(text, '*'); }

// Tells whether `text` is `glob` with something for each '*'. On a mismatch the last '*' takes one
// more character, so the match needs neither recursion nor extra memory.
bool GlobMatches(absl::string_view glob, absl::string_view text) {
  size_t g = 0, t = 0;
  size_t star = absl::string_view::npos, star_end = 0;
  while (t < text.size()) {
    if (g < glob.size() && glob[g] == '*') {
      star = g++;
      star_end = t;
    } else if (g < glob.size() && glob[g] == text[t]) {
      ++g;
      ++t;
    } else if (star != absl::string_view::npos) {
      g = star + 1;
      t = ++star_end;
    } else {
      return false;
    }
  }
  while (g < glob.size() && glob[g] == '*') ++g;
  return g == glob.size();
}

bool LabelsMatch(const std::vector<std::string>& globs, const std::vector<std::string>& labels) {
  return std::equal(globs.begin(), globs.end(), labels.begin(), labels.end(), GlobMatches);
}

std::vector<std::string> NameLabels(absl::string_view name) {
  absl::ConsumeSuffix(&name, ".");
  return absl::StrSplit(absl::AsciiStrToLower(name), '.');
}

// Reads groups between colons; an empty text has none.
std::optional<std::vector<std::optional<uint16_t>>> ParseGroups(absl::string_view text) {
  std::vector<std::optional<uint16_t>> groups;
  if (text.empty()) return groups;
  for (const absl::string_view part : absl::StrSplit(text, ':')) {
    uint32_t value = 0;
    if (part == "*") {
      groups.push_back(std::nullopt);
    } else if (part.size() <= 4 && absl::SimpleHexAtoi(part, &value)) {
      groups.push_back(static_cast<uint16_t>(value));
    } else {
      return std::nullopt;
    }
  }
  return groups;
}

// Reads an IPv6 address with '*' for any group; "::" stands for the zeros that are left out.
std::optional<Ipv6Groups> ParseIpv6Pattern(absl::string_view host) {
  const std::vector<absl::string_view> halves = absl::StrSplit(host, "::");
  if (halves.size() > 2) return std::nullopt;
  const auto head = ParseGroups(halves[0]);
  const auto tail =
      halves.size() == 2 ? ParseGroups(halves[1]) : std::vector<std::optional<uint16_t>>();
  if (!head.has_value() || !tail.has_value()) return std::nullopt;
  const size_t given = head->size() + tail->size();
  Ipv6Groups groups;
  if (halves.size() == 2 ? given >= groups.size() : given != groups.size()) return std::nullopt;
  groups.fill(uint16_t{0});
  std::copy(head->begin(), head->end(), groups.begin());
  std::copy_backward(tail->begin(), tail->end(), groups.end());
  return groups;
}

bool Ipv6Matches(const Ipv6Groups& groups, const std::string& host) {
  in6_addr address;
  if (inet_pton(AF_INET6, host.c_str(), &address) != 1) return false;
  for (size_t i = 0; i < groups.size(); ++i) {
    const uint16_t group = address.s6_addr[2 * i] << 8 | address.s6_addr[2 * i + 1];
    if (groups[i].value_or(group) != group) return false;
  }
  return true;
}

// Reads a host without brackets: an IPv4 address or a name.
std::optional<Pattern> ParseHost(absl::string_view host) {
  Pattern pattern;
  pattern.labels = NameLabels(host);
  // With something for the stars it must be such a host itself.
  const auto filled = [host](const char* star) {
    return ParseHostPort(absl::StrCat(absl::StrReplaceAll(host, {{"*", star}}), ":1"));
  };
  const bool address_like = std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isdigit(static_cast<unsigned char>(c)) || c == '.' || c == '*';
  });
  if (address_like) {
    pattern.kind = Pattern::Kind::kIpv4;
    const bool whole = std::all_of(pattern.labels.begin(), pattern.labels.end(),
                                   [](const std::string& l) { return l == "*" || !HasStar(l); });
    if (!whole || pattern.labels.size() != 4 || !filled("1").has_value()) return std::nullopt;
    return pattern;
  }
  if (pattern.labels.size() > 1 && HasStar(pattern.labels.back())) return std::nullopt;
  const std::optional<HostPort> name = filled("a");
  if (!name.has_value() || !name->is_name) return std::nullopt;
  return pattern;
}

std::optional<Pattern> ParsePattern(absl::string_view text) {
  if (absl::StartsWith(text, "unix:")) {
    if (!UnixSocketPath(text).has_value()) return std::nullopt;
    Pattern pattern;
    pattern.kind = Pattern::Kind::kUnix;
    pattern.labels = absl::StrSplit(text, '/');
    return pattern;
  }
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return std::nullopt;
  absl::string_view host = text.substr(0, colon);
  const absl::string_view port = text.substr(colon + 1);
  std::optional<Pattern> pattern;
  if (absl::ConsumePrefix(&host, "[") && absl::ConsumeSuffix(&host, "]")) {
    if (const auto groups = ParseIpv6Pattern(host)) {
      pattern.emplace();
      pattern->kind = Pattern::Kind::kIpv6;
      pattern->groups = *groups;
    }
  } else {
    pattern = ParseHost(host);
  }
  if (!pattern.has_value() || port == "*") return pattern;
  const std::optional<HostPort> place = ParseHostPort(absl::StrCat("a:", port));
  if (!place.has_value()) return std::nullopt;
  pattern->port = place->port;
  return pattern;
}

}  // namespace

std::optional<std::string> AddressPatternProblem(absl::string_view pattern) {
  if (ParsePattern(pattern).has_value()) return std::nullopt;
  return absl::StrCat("'", absl::CHexEscape(pattern),
                      "' is no pattern of addresses: four labels of an IPv4 address "
                      "(10.2.*.*:50052), an IPv6 address ([fd00::*]:50052), a name whose last of "
                      "several labels has no '*' (*.pods:50052), or unix:/path");
}

bool AddressMatches(absl::string_view pattern_text, absl::string_view address) {
  const std::optional<Pattern> pattern = ParsePattern(pattern_text);
  if (!pattern.has_value()) return false;
  if (pattern->kind == Pattern::Kind::kUnix) {
    return UnixSocketPath(address).has_value() &&
           LabelsMatch(pattern->labels, absl::StrSplit(address, '/'));
  }
  const std::optional<HostPort> place = ParseHostPort(address);
  if (!place.has_value() || pattern->port.value_or(place->port) != place->port) return false;
  const bool is_ipv6 = absl::StartsWith(address, "[");
  switch (pattern->kind) {
    case Pattern::Kind::kIpv6:
      return is_ipv6 && Ipv6Matches(pattern->groups, place->host);
    case Pattern::Kind::kIpv4:
      return !is_ipv6 && !place->is_name && LabelsMatch(pattern->labels, NameLabels(place->host));
    default:
      return place->is_name && LabelsMatch(pattern->labels, NameLabels(place->host));
  }
}

}  // namespace prefilld::wire
