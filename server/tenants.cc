#include "server/tenants.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <iterator>
#include <utility>

#include <openssl/sha.h>
#include <nlohmann/json.hpp>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "proto/process/problems.h"
#include "proto/status_macros.h"
#include "proto/wire/address_pattern.h"
#include "proto/wire/request_id.h"
#include "proto/wire/tls.h"
#include "server/fair_shares.h"
#include "server/refusal_cause.h"

namespace prefilld::server {
namespace {

using nlohmann::json;

constexpr size_t kMaxFileBytes = size_t{4} << 20;
constexpr size_t kSha256HexDigits = 64;
constexpr double kMaxWeight = 1e6;
constexpr double kMaxTokens = 1e12;  // of any limit in tokens
constexpr double kMostLanes = 16;

std::string Sha256Hex(absl::string_view text) {
  unsigned char digest[SHA256_DIGEST_LENGTH];
  SHA256(reinterpret_cast<const unsigned char*>(text.data()), text.size(), digest);
  return absl::BytesToHexString(
      absl::string_view(reinterpret_cast<const char*>(digest), sizeof(digest)));
}

bool IsSha256Hex(absl::string_view text) {
  return text.size() == kSha256HexDigits && std::all_of(text.begin(), text.end(), [](char c) {
           return absl::ascii_isxdigit(static_cast<unsigned char>(c));
         });
}

std::string Shown(const json& value) {
  return wire::ShownId(value.dump(-1, ' ', /*ensure_ascii=*/true, json::error_handler_t::replace));
}

// Reads the fields of one object, and remembers what is wrong with them.
class FieldReader {
 public:
  FieldReader(std::string where, const json& object, process::Problems& problems)
      : where_(std::move(where)), object_(object), problems_(problems) {}

  // Returns `value` if there is no such field.
  double Number(const char* field, double value, double low, double high) {
    const json* found = Find(field);
    if (found == nullptr) return value;
    const double number = found->is_number() ? found->get<double>() : NAN;
    if (number >= low && number <= high) return number;
    Add(absl::StrCat(field, " is ", Shown(*found), "; a number from ", low, " to ", high));
    return value;
  }
  int64_t Integer(const char* field, int64_t value, double low, double high) {
    const json* found = Find(field);
    if (found != nullptr && found->is_number() && !found->is_number_integer()) {
      Add(absl::StrCat(field, " is ", Shown(*found), "; a whole number"));
      return value;
    }
    return static_cast<int64_t>(Number(field, static_cast<double>(value), low, high));
  }
  std::vector<std::string> Texts(const char* field) {
    const json* found = Find(field);
    std::vector<std::string> texts;
    if (found == nullptr) return texts;
    if (!found->is_array()) {
      Add(absl::StrCat(field, " is ", Shown(*found), "; a list of texts"));
      return texts;
    }
    for (const json& text : *found)
      texts.push_back(text.is_string() ? text.get<std::string>() : "");
    return texts;
  }
  // A list that is absent sets no limit. An empty one would leave open whether it does.
  std::vector<std::string> Allowed(const char* field) {
    std::vector<std::string> texts = Texts(field);
    if (const json* found = Find(field); found != nullptr && found->is_array() && found->empty()) {
      Add(absl::StrCat(field, " is an empty list; at least one text, or no such field"));
    }
    return texts;
  }
  bool Bool(const char* field, bool value) {
    const json* found = Find(field);
    if (found == nullptr) return value;
    if (found->is_boolean()) return found->get<bool>();
    Add(absl::StrCat(field, " is ", Shown(*found), "; true or false"));
    return value;
  }
  std::string Text(const char* field, const std::string& value) {
    const json* found = Find(field);
    if (found == nullptr) return value;
    if (found->is_string()) return found->get<std::string>();
    Add(absl::StrCat(field, " is ", Shown(*found), "; a text"));
    return value;
  }
  const json* Find(const char* field) {
    known_.emplace_back(field);
    const auto found = object_.find(field);
    return found == object_.end() ? nullptr : &*found;
  }
  // Must come last. A field that nobody has asked for is wrong, because it may be a limit whose
  // name is misspelt.
  void RefuseOthers() {
    for (const auto& [field, value] : object_.items()) {
      if (std::find(known_.begin(), known_.end(), field) == known_.end()) {
        Add(absl::StrCat("unknown field ", Shown(field)));
      }
    }
  }
  void Add(const std::string& problem) { problems_.push_back(absl::StrCat(where_, ": ", problem)); }

 private:
  const std::string where_;
  const json& object_;
  process::Problems& problems_;
  std::vector<std::string> known_;
};

void ReadRules(FieldReader& fields, Tenant& tenant) {
  for (const std::string& name : fields.Allowed("policies")) {
    if (const auto policy = model::ParsePolicy(name); policy.has_value()) {
      tenant.policies.push_back(*policy);
    } else {
      fields.Add(absl::StrCat("policies has '", wire::ShownId(name), "'; one of ",
                              model::AllPolicyNames()));
    }
  }
  tenant.max_lanes = static_cast<int>(fields.Integer("max_lanes", 0, 0, kMostLanes));
  tenant.pushes = fields.Bool("pushes", true);
  tenant.deliver_to = fields.Allowed("deliver_to");
  for (const std::string& pattern : tenant.deliver_to) {
    if (const auto problem = wire::AddressPatternProblem(pattern)) {
      fields.Add(absl::StrCat("deliver_to: ", *problem));
    }
  }
  if (!tenant.pushes && !tenant.deliver_to.empty()) fields.Add("deliver_to without pushes");
  tenant.certificates = fields.Allowed("certificates");
  if (std::find(tenant.certificates.begin(), tenant.certificates.end(), "") !=
      tenant.certificates.end()) {
    fields.Add("certificates has an empty name");
  }
}

Tenant ReadTenant(FieldReader& fields) {
  Tenant tenant;
  tenant.name = fields.Text("name", "");
  if (tenant.name.empty() || !wire::CheckId("name", tenant.name).ok()) {
    fields.Add(absl::StrCat("name has ", tenant.name.size(), " bytes; 1 to ",
                            Tenants::kMaxNameBytes, " printable ASCII characters"));
  }
  tenant.weight = fields.Number("weight", 1, 1 / kMaxWeight, kMaxWeight);
  tenant.max_priority =
      static_cast<int>(fields.Integer("max_priority", 0, -kMaxPriority, kMaxPriority));
  tenant.max_requests = fields.Integer("max_requests", 0, 0, kMaxTokens);
  tenant.max_queued_tokens = fields.Integer("max_queued_tokens", 0, 0, kMaxTokens);
  tenant.tokens_per_second = fields.Number("tokens_per_second", 0, 0, kMaxTokens);
  ReadRules(fields, tenant);
  return tenant;
}

}  // namespace

static_assert(Tenants::kMaxNameBytes == wire::kMaxIdBytes, "names are checked as ids");

Tenants::Tenants() : all_(1), default_(0) { by_name_[all_[0].name] = 0; }

absl::StatusOr<Tenants> Tenants::Parse(absl::string_view text, Strangers unless_said) {
  const json file = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!file.is_object()) return absl::InvalidArgumentError("the file is not a JSON object");
  process::Problems problems;
  FieldReader top("the file", file, problems);
  const std::string unknown =
      top.Text("unknown", unless_said == Strangers::kRefused ? "refuse" : "default");
  if (unknown != "default" && unknown != "refuse") {
    top.Add(absl::StrCat("unknown is ", Shown(unknown), "; default or refuse"));
  }
  const json* list = top.Find("tenants");
  top.RefuseOthers();
  if (list == nullptr || !list->is_array() || list->empty() || list->size() > kMaxTenants) {
    top.Add(absl::StrCat("tenants is not a list of 1 to ", kMaxTenants, " tenants"));
    return process::ToStatus(problems);
  }

  Tenants tenants;
  tenants.all_.clear();
  tenants.by_name_.clear();
  for (size_t i = 0; i < list->size(); ++i) {
    const json& entry = (*list)[i];
    if (!entry.is_object()) {
      problems.push_back(absl::StrCat("tenants[", i, "] is ", Shown(entry), "; an object"));
      continue;
    }
    const auto name = entry.find("name");
    FieldReader fields(name == entry.end() ? absl::StrCat("tenants[", i, "]")
                                           : absl::StrCat("tenant ", Shown(*name)),
                       entry, problems);
    Tenant tenant = ReadTenant(fields);
    for (const std::string& hash : fields.Texts("token_sha256")) {
      if (!IsSha256Hex(hash)) {
        fields.Add(
            absl::StrCat("a token_sha256 is not of ", kSha256HexDigits, " hexadecimal digits"));
      } else if (absl::AsciiStrToLower(hash) == Sha256Hex("")) {
        fields.Add("a token_sha256 is that of an empty token");
      } else if (!tenants.by_token_.emplace(absl::AsciiStrToLower(hash), i).second) {
        fields.Add("a token_sha256 is there twice");
      }
    }
    fields.RefuseOthers();
    if (!tenants.by_name_.emplace(tenant.name, i).second) fields.Add("the name is there twice");
    tenants.all_.push_back(std::move(tenant));
  }
  PREFILLD_RETURN_IF_ERROR(process::ToStatus(problems));

  tenants.default_.reset();
  if (unknown == "refuse") return tenants;
  const auto named = tenants.by_name_.find(kDefaultTenant);
  if (named != tenants.by_name_.end()) {
    tenants.default_ = named->second;
  } else {
    tenants.default_ = tenants.all_.size();
    tenants.by_name_[std::string(kDefaultTenant)] = tenants.all_.size();
    tenants.all_.emplace_back();
  }
  return tenants;
}

absl::StatusOr<Tenants> Tenants::Read(const std::string& path, Strangers unless_said) {
  // The version is older than what is read, so that a change between the two is seen.
  std::string version = wire::FileVersions({path});
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, " cannot be read"));
  std::string text(kMaxFileBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(file.gcount()));
  if (text.size() > kMaxFileBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, " has more than ", kMaxFileBytes, " bytes"));
  }
  auto tenants = Parse(text, unless_said);
  if (tenants.ok()) {
    tenants->file_version_ = std::move(version);
    return tenants;
  }
  return absl::InvalidArgumentError(absl::StrCat(path, ": ", tenants.status().message()));
}

absl::StatusOr<Tenants> Tenants::InPositionsOf(const Tenants& before) const {
  Tenants tenants = *this;
  tenants.all_ = before.all_;
  absl::flat_hash_map<std::string, size_t> positions;
  for (size_t i = 0; i < tenants.all_.size(); ++i) {
    tenants.all_[i].is_gone = true;
    positions[tenants.all_[i].name] = i;
  }
  std::vector<size_t> moved_to;  // by the position in this table
  for (const Tenant& tenant : all_) {
    const auto [found, is_new] = positions.emplace(tenant.name, tenants.all_.size());
    if (is_new) {
      tenants.all_.push_back(tenant);
    } else {
      tenants.all_[found->second] = tenant;
    }
    moved_to.push_back(found->second);
  }
  if (tenants.all_.size() > kMaxPositions) {
    return absl::ResourceExhaustedError(
        absl::StrCat(tenants.all_.size(), " names of tenants since the start; at most ",
                     kMaxPositions, ": a restart forgets those that are gone"));
  }
  if (default_.has_value()) tenants.default_ = moved_to[*default_];
  for (auto& [name, position] : tenants.by_name_) position = moved_to[position];
  for (auto& [token, position] : tenants.by_token_) position = moved_to[position];
  return tenants;
}

std::optional<size_t> Tenants::ByName(absl::string_view name) const {
  const auto found = by_name_.find(name);
  return found == by_name_.end() ? default_ : found->second;
}

std::optional<size_t> Tenants::ByToken(absl::string_view token) const {
  if (token.empty()) return default_;
  const auto found = by_token_.find(Sha256Hex(token));
  return found == by_token_.end() ? default_ : found->second;
}

absl::Status CheckTenantUse(const Tenant& tenant, const TenantUse& use, int64_t num_tokens,
                            int64_t num_requests) {
  if (tenant.max_requests > 0 && use.requests + num_requests > tenant.max_requests) {
    return Because(
        RefusalCause::kTenantRequests,
        absl::ResourceExhaustedError(absl::StrCat(
            "tenant ", tenant.name, ": ", use.requests, " requests are under way",
            num_requests == 1 ? "" : absl::StrCat(" and one of ", num_requests, " receivers came"),
            "; at most ", tenant.max_requests, " (max_requests)")));
  }
  if (tenant.max_queued_tokens > 0 && use.queued_tokens > 0 &&
      use.queued_tokens + num_tokens > tenant.max_queued_tokens) {
    return Because(
        RefusalCause::kTenantQueuedTokens,
        absl::ResourceExhaustedError(absl::StrCat(
            "tenant ", tenant.name, ": ", use.queued_tokens, " tokens wait and ", num_tokens,
            " came; at most ", tenant.max_queued_tokens, " (max_queued_tokens)")));
  }
  return absl::OkStatus();
}

TokenBucket::TokenBucket(double tokens_per_second)
    : rate_(tokens_per_second), level_(kBurstSeconds * tokens_per_second) {}

void TokenBucket::SetRate(double tokens_per_second, absl::Time now) {
  if (tokens_per_second == rate_) return;
  if (rate_ <= 0 || since_ == absl::InfinitePast()) {
    *this = TokenBucket(tokens_per_second);
    return;
  }
  level_ = Level(now);
  since_ = now;
  rate_ = tokens_per_second;
}

double TokenBucket::Level(absl::Time now) const {
  const double full = kBurstSeconds * rate_;
  if (since_ == absl::InfinitePast()) return full;
  return std::min(full, level_ + rate_ * absl::ToDoubleSeconds(now - since_));
}

absl::Duration TokenBucket::WaitFor(int64_t num_tokens, absl::Time now) const {
  if (rate_ <= 0) return absl::ZeroDuration();
  const double needed = std::min(static_cast<double>(num_tokens), kBurstSeconds * rate_);
  const double missing = needed - Level(now);
  return missing <= 0 ? absl::ZeroDuration()
                      : absl::Ceil(absl::Seconds(missing / rate_), absl::Milliseconds(1));
}

void TokenBucket::Take(int64_t num_tokens, absl::Time now) {
  level_ = Level(now) - static_cast<double>(num_tokens);
  since_ = now;
}

absl::Status CheckTenantRate(const Tenant& tenant, const TokenBucket& bucket, int64_t num_tokens,
                             absl::Time now) {
  const absl::Duration wait = bucket.WaitFor(num_tokens, now);
  if (wait == absl::ZeroDuration()) return absl::OkStatus();
  return Because(
      RefusalCause::kTenantRate,
      absl::ResourceExhaustedError(absl::StrCat(
          "tenant ", tenant.name, ": ", num_tokens, " tokens came ", absl::FormatDuration(wait),
          " too soon; at most ", tenant.tokens_per_second, " a second (tokens_per_second)")));
}

}  // namespace prefilld::server
