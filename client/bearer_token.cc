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
  std::unique_ptr<BearerToken> token(new BearerToken(path));
  absl::MutexLock lock(&token->mu_);
  token->version_ = wire::FileVersions({path});
  PREFILLD_ASSIGN_OR_RETURN(token->token_, ReadToken(path));
  return token;
}

std::string BearerToken::Authorization() {
  absl::MutexLock lock(&mu_);
  std::string version = wire::FileVersions({path_});
  if (version != version_ && HasRested(path_)) {
    if (auto token = ReadToken(path_); token.ok()) {
      token_ = *std::move(token);
      version_ = std::move(version);
    }
  }
  return absl::StrCat("Bearer ", token_);
}

}  // namespace prefilld::client
