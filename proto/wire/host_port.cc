#include "proto/wire/host_port.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"

namespace prefilld::wire {
namespace {

bool IsHostName(absl::string_view host) {
  return !host.empty() && std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '-' || c == '_';
  });
}

bool IsIpv6(absl::string_view host) {
  return !host.empty() && std::all_of(host.begin(), host.end(), [](char c) {
    return absl::ascii_isxdigit(static_cast<unsigned char>(c)) || c == ':' || c == '.';
  });
}

bool EndsLabel(char c) { return c == '.' || c == ':'; }

std::string NotAnAddress(absl::string_view setting, absl::string_view text,
                         absl::string_view lowest_port) {
  return absl::StrCat(setting, "=", absl::CHexEscape(text),
                      " is not host:port: a name, an IPv4 address or an IPv6 address in brackets, "
                      "then a port from ",
                      lowest_port, " to 65535");
}

}  // namespace

std::optional<HostPort> ParseHostPort(absl::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return std::nullopt;
  absl::string_view host = text.substr(0, colon);
  const absl::string_view port = text.substr(colon + 1);
  const bool bracketed = host.size() >= 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);
  if (bracketed ? !IsIpv6(host) : !IsHostName(host)) return std::nullopt;

  HostPort result{.host = std::string(host)};
  const bool digits =
      !port.empty() && port.size() <= 5 && std::all_of(port.begin(), port.end(), [](char c) {
        return absl::ascii_isdigit(static_cast<unsigned char>(c));
      });
  if (!digits || !absl::SimpleAtoi(port, &result.port) || result.port > 65535) return std::nullopt;
  return result;
}

std::optional<std::string> ListenAddressProblem(absl::string_view setting, absl::string_view text) {
  if (ParseHostPort(text).has_value()) return std::nullopt;
  return NotAnAddress(setting, text, "0 (any free port)");
}

std::optional<std::string> DialAddressProblem(absl::string_view setting, absl::string_view text) {
  const std::optional<HostPort> address = ParseHostPort(text);
  if (address.has_value() && address->port > 0) return std::nullopt;
  return NotAnAddress(setting, text, "1");
}

bool AddressMatches(absl::string_view pattern, absl::string_view address) {
  if (!ParseHostPort(address).has_value()) return false;
  // On a mismatch the last '*' takes one more character. So the match needs neither recursion nor
  // extra memory.
  size_t p = 0, a = 0;
  size_t star = absl::string_view::npos, star_end = 0;
  while (a < address.size()) {
    if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      star_end = a;
    } else if (p < pattern.size() && pattern[p] == address[a]) {
      ++p;
      ++a;
    } else if (star != absl::string_view::npos && !EndsLabel(address[star_end])) {
      p = star + 1;
      a = ++star_end;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') ++p;
  return p == pattern.size();
}

bool IsAddressPattern(absl::string_view pattern) {
  return ParseHostPort(absl::StrReplaceAll(pattern, {{"*", "1"}})).has_value();
}

}  // namespace prefilld::wire
