#include "proto/wire/host_port.h"

#include <arpa/inet.h>
#include <sys/un.h>

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"

namespace prefilld::wire {
namespace {

bool IsDigit(char c) { return absl::ascii_isdigit(static_cast<unsigned char>(c)); }

bool IsLabel(absl::string_view label) {
  return !label.empty() && std::all_of(label.begin(), label.end(), [](char c) {
    return absl::ascii_isalnum(static_cast<unsigned char>(c)) || c == '-' || c == '_';
  });
}

// Tells whether a resolver may take a name that ends with this label for a number.
bool IsNumber(absl::string_view label) {
  return std::all_of(label.begin(), label.end(), IsDigit) ||
         absl::StartsWithIgnoreCase(label, "0x");
}

// A dot after the last label says that the name is complete.
bool IsHostName(absl::string_view host) {
  absl::ConsumeSuffix(&host, ".");
  const std::vector<absl::string_view> labels = absl::StrSplit(host, '.');
  return std::all_of(labels.begin(), labels.end(), IsLabel) && !IsNumber(labels.back());
}

bool IsIp(int family, const std::string& host) {
  in6_addr address;
  return inet_pton(family, host.c_str(), &address) == 1;
}

std::string NotAnAddress(absl::string_view setting, absl::string_view text,
                         absl::string_view lowest_port, absl::string_view or_else) {
  return absl::StrCat(setting, "=", absl::CHexEscape(text),
                      " is not host:port: a name, an IPv4 address or an IPv6 address in brackets, "
                      "then a port from ",
                      lowest_port, " to 65535", or_else);
}

constexpr char kAnyPort[] = "0 (any free port)";
constexpr char kOrUnix[] = "; nor unix:/path of a socket, of at most 107 characters";

}  // namespace

std::optional<HostPort> ParseHostPort(absl::string_view text) {
  const size_t colon = text.rfind(':');
  if (colon == absl::string_view::npos) return std::nullopt;
  absl::string_view host = text.substr(0, colon);
  const absl::string_view port = text.substr(colon + 1);
  const bool bracketed = host.size() >= 2 && host.front() == '[' && host.back() == ']';
  if (bracketed) host = host.substr(1, host.size() - 2);

  HostPort result{.host = std::string(host)};
  result.is_name = !bracketed && IsHostName(host);
  if (!result.is_name && !IsIp(bracketed ? AF_INET6 : AF_INET, result.host)) return std::nullopt;
  const bool digits =
      !port.empty() && port.size() <= 5 && std::all_of(port.begin(), port.end(), IsDigit);
  if (!digits || !absl::SimpleAtoi(port, &result.port) || result.port > 65535) return std::nullopt;
  return result;
}

std::optional<std::string> UnixSocketPath(absl::string_view text) {
  if (!absl::ConsumePrefix(&text, "unix:") || !absl::StartsWith(text, "/")) return std::nullopt;
  const bool plain = std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isgraph(static_cast<unsigned char>(c)) && c != ',';
  });
  // The system's limit includes the zero at the end.
  if (!plain || text.size() >= sizeof(sockaddr_un::sun_path)) return std::nullopt;
  return std::string(text);
}

std::vector<std::string> SplitAddresses(absl::string_view list) {
  return absl::StrSplit(list, ',');
}

std::optional<std::string> ListenAddressProblem(absl::string_view setting, absl::string_view text) {
  if (ParseHostPort(text).has_value()) return std::nullopt;
  return NotAnAddress(setting, text, kAnyPort, "");
}

std::optional<std::string> ListenOrUnixProblem(absl::string_view setting, absl::string_view text) {
  if (ParseHostPort(text).has_value() || UnixSocketPath(text).has_value()) return std::nullopt;
  return NotAnAddress(setting, text, kAnyPort, kOrUnix);
}

std::optional<std::string> DialAddressProblem(absl::string_view setting, absl::string_view text) {
  if (UnixSocketPath(text).has_value()) return std::nullopt;
  const std::optional<HostPort> address = ParseHostPort(text);
  if (address.has_value() && address->port > 0) return std::nullopt;
  return NotAnAddress(setting, text, "1", kOrUnix);
}

}  // namespace prefilld::wire
