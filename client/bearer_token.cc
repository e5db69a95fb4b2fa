#include "client/bearer_token.h"

#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "proto/status_macros.h"
#include "proto/wire/tls.h"

namespace prefilld::client {
namespace {

constexpr size_t kMaxFileBytes = 8192;
constexpr absl::Duration kRest = absl::Seconds(1);
constexpr absl::Duration kLookEvery = absl::Seconds(1);

absl::StatusOr<std::string> ReadToken(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string text(kMaxFileBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  text.resize(static_cast<size_t>(std::max<std::streamsize>(0, file.gcount())));
  const absl::string_view token = absl::StripAsciiWhitespace(text);
  const bool is_token = !token.empty() && text.size() <= kMaxFileBytes &&
                        std::all_of(token.begin(), token.end(), [](char c) {
                          return absl::ascii_isgraph(static_cast<unsigned char>(c));
                        });
  if (is_token) return std::string(token);
  return absl::InvalidArgumentError(
      absl::StrCat("token_file ", path, " holds no token: one line of at most ", kMaxFileBytes,
                   " printable ASCII characters without blanks"));
}

bool HasRested(const std::string& path) {
  struct stat facts = {};
  if (stat(path.c_str(), &facts) != 0) return false;
  const absl::Duration age = absl::Now() - absl::TimeFromTimespec(facts.st_mtim);
  return age >= kRest || age < absl::ZeroDuration();  // another clock wrote it
}

}  // namespace

absl::StatusOr<std::unique_ptr<BearerToken>> BearerToken::Read(const std::string& path) {
  std::string version = wire::FileVersions({path});
  PREFILLD_ASSIGN_OR_RETURN(std::string token, ReadToken(path));
  return std::unique_ptr<BearerToken>(new BearerToken(path, std::move(version), std::move(token)));
}

std::string BearerToken::Authorization(absl::Time now) {
  {
    absl::MutexLock lock(&mu_);
    if (looking_ || now < next_look_) return absl::StrCat("Bearer ", token_);
    looking_ = true;
    next_look_ = now + kLookEvery;
  }
  Look();
  absl::MutexLock lock(&mu_);
  looking_ = false;
  return absl::StrCat("Bearer ", token_);
}

void BearerToken::Look() {
  std::string version = wire::FileVersions({path_});
  if (version == version_ || !HasRested(path_)) return;
  auto token = ReadToken(path_);
  if (!token.ok()) return;
  version_ = std::move(version);
  absl::MutexLock lock(&mu_);
  token_ = *std::move(token);
}

}  // namespace prefilld::client
