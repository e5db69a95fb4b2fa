#include "proto/wire/trace_context.h"

#include <algorithm>
#include <cstdint>

#include <grpcpp/server_context.h>

#include "absl/random/random.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace prefilld::wire {
namespace {

constexpr char kTraceparentKey[] = "traceparent";
constexpr char kTracestateKey[] = "tracestate";
constexpr size_t kTraceparentBytes = 55;
constexpr size_t kMaxStateBytes = 512;
constexpr size_t kMaxStateMembers = 32;
constexpr size_t kMaxMemberPartBytes = 256;

bool IsLowerHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) {
    return absl::ascii_isdigit(static_cast<unsigned char>(c)) || (c >= 'a' && c <= 'f');
  });
}

bool IsId(absl::string_view text) {
  return IsLowerHex(text) && text.find_first_not_of('0') != absl::string_view::npos;
}

std::string NewId(int digits) {
  static thread_local absl::BitGen random;
  std::string id;
  while (static_cast<int>(id.size()) < digits) {
    absl::StrAppendFormat(&id, "%016x",
                          absl::Uniform<uint64_t>(absl::IntervalClosed, random, 1, UINT64_MAX));
  }
  return id;
}

// Sets trace, parent and flags. Later versions may have more behind what is known of version 00.
bool ReadTraceparent(absl::string_view text, TraceContext& context) {
  if (text.size() < kTraceparentBytes) return false;
  const absl::string_view version = text.substr(0, 2), trace_id = text.substr(3, 32),
                          parent_id = text.substr(36, 16), flags = text.substr(53, 2);
  if (text[2] != '-' || text[35] != '-' || text[52] != '-') return false;
  if (!IsLowerHex(version) || version == "ff" || !IsLowerHex(flags)) return false;
  if (version == "00" && text.size() != kTraceparentBytes) return false;
  if (text.size() > kTraceparentBytes && text[kTraceparentBytes] != '-') return false;
  if (!IsId(trace_id) || !IsId(parent_id)) return false;
  context.trace_id = std::string(trace_id);
  context.parent_span_id = std::string(parent_id);
  context.flags = std::string(flags);
  return true;
}

bool IsStateMember(absl::string_view member) {
  const size_t equals = member.find('=');
  if (equals == absl::string_view::npos) return false;
  const absl::string_view key = member.substr(0, equals), value = member.substr(equals + 1);
  const auto is_of_key = [](char c) {
    return absl::ascii_islower(static_cast<unsigned char>(c)) ||
           absl::ascii_isdigit(static_cast<unsigned char>(c)) ||
           absl::string_view("_-*/@").find(c) != absl::string_view::npos;
  };
  const auto is_of_value = [](char c) { return c >= ' ' && c <= '~' && c != ',' && c != '='; };
  return !key.empty() && key.size() <= kMaxMemberPartBytes &&
         absl::ascii_isalnum(static_cast<unsigned char>(key[0])) &&
         std::all_of(key.begin(), key.end(), is_of_key) && !value.empty() &&
         value.size() <= kMaxMemberPartBytes &&
         std::all_of(value.begin(), value.end(), is_of_value);
}

// Several headers are one list, in their order.
bool ReadTracestate(const std::vector<absl::string_view>& values, TraceContext& context) {
  std::vector<absl::string_view> members;
  for (const absl::string_view value : values) {
    for (const absl::string_view part : absl::StrSplit(value, ',')) {
      const absl::string_view member = absl::StripAsciiWhitespace(part);
      if (member.empty()) continue;
      if (!IsStateMember(member) || members.size() == kMaxStateMembers) return false;
      members.push_back(member);
    }
  }
  std::string state = absl::StrJoin(members, ",");
  if (state.size() > kMaxStateBytes) return false;
  context.state = std::move(state);
  return true;
}

std::vector<absl::string_view> ValuesOf(const grpc::ServerContextBase& call, const char* key) {
  std::vector<absl::string_view> values;
  const auto [first, last] = call.client_metadata().equal_range(key);
  for (auto entry = first; entry != last; ++entry) {
    values.emplace_back(entry->second.data(), entry->second.size());
  }
  return values;
}

}  // namespace

// The lowest bit of the flags, and so of their second digit.
bool TraceContext::is_recorded() const {
  return absl::string_view("13579bdf").find(flags.back()) != absl::string_view::npos;
}

TraceContext TraceContext::Child() const {
  TraceContext child = *this;
  child.parent_span_id = span_id;
  child.span_id = NewId(16);
  return child;
}

std::string TraceContext::traceparent() const {
  return absl::StrCat("00-", trace_id, "-", span_id, "-", flags);
}

std::vector<std::pair<std::string, std::string>> TraceContext::Metadata() const {
  std::vector<std::pair<std::string, std::string>> metadata = {{kTraceparentKey, traceparent()}};
  if (!state.empty()) metadata.emplace_back(kTracestateKey, state);
  return metadata;
}

TakenTrace TakeTrace(const std::vector<absl::string_view>& traceparents,
                     const std::vector<absl::string_view>& tracestates) {
  TakenTrace taken;
  const bool has_parent =
      traceparents.size() == 1 && ReadTraceparent(traceparents.front(), taken.context);
  taken.ignored = has_parent ? !ReadTracestate(tracestates, taken.context)
                             : !traceparents.empty() || !tracestates.empty();
  if (!has_parent) taken.context.trace_id = NewId(32);
  taken.context.span_id = NewId(16);
  return taken;
}

TakenTrace TakeTrace(const grpc::ServerContextBase& call) {
  return TakeTrace(ValuesOf(call, kTraceparentKey), ValuesOf(call, kTracestateKey));
}

}  // namespace prefilld::wire
