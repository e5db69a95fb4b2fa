#include "proto/wire/certificates.h"

#include <openssl/err.h>
#include <openssl/pem.h>
#include <openssl/x509.h>

#include <algorithm>
#include <ctime>
#include <memory>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/status_macros.h"

namespace prefilld::wire {
namespace {

using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using PrivateKey = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using Bio = std::unique_ptr<BIO, decltype(&BIO_free)>;

// OpenSSL would ask for a password on the terminal.
int NoPassword(char*, int, int, void*) { return -1; }

Bio Open(const std::string& text) {
  return Bio(BIO_new_mem_buf(text.data(), static_cast<int>(text.size())), BIO_free);
}

absl::Status Problem(const PemText& pem, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat(pem.name, " ", problem));
}

absl::Time ToTime(const ASN1_TIME* time) {
  std::tm parts = {};
  ASN1_TIME_to_tm(time, &parts);
  return absl::FromTimeT(timegm(&parts));
}

std::string Day(absl::Time time) {
  return absl::FormatTime("%Y-%m-%d %H:%M:%S UTC", time, absl::UTCTimeZone());
}

// Reads certificates up to the end of the text. Other kinds of PEM blocks are passed over.
absl::StatusOr<std::vector<Certificate>> ParseCertificates(const PemText& pem) {
  std::vector<Certificate> certificates;
  const Bio bio = Open(pem.text);
  while (X509* next = PEM_read_bio_X509(bio.get(), nullptr, NoPassword, nullptr)) {
    certificates.emplace_back(next, X509_free);
  }
  const unsigned long error = ERR_peek_last_error();
  const bool at_end =
      ERR_GET_LIB(error) == ERR_LIB_PEM && ERR_GET_REASON(error) == PEM_R_NO_START_LINE;
  ERR_clear_error();
  if (!at_end) {
    return Problem(pem, absl::StrCat("has a certificate that cannot be parsed, after ",
                                     certificates.size(), " that can"));
  }
  if (certificates.empty()) return Problem(pem, "holds no certificate");
  return certificates;
}

}  // namespace

absl::StatusOr<absl::Time> CheckKeyPair(const PemText& chain, const PemText& key, absl::Time now) {
  PREFILLD_ASSIGN_OR_RETURN(const auto certificates, ParseCertificates(chain));
  absl::Time expiry = absl::InfiniteFuture();
  for (const Certificate& certificate : certificates) {
    const absl::Time starts = ToTime(X509_get0_notBefore(certificate.get()));
    const absl::Time ends = ToTime(X509_get0_notAfter(certificate.get()));
    if (now >= ends) return Problem(chain, absl::StrCat("has expired: valid until ", Day(ends)));
    if (now < starts)
      return Problem(chain, absl::StrCat("is valid only from ", Day(starts), " on"));
    expiry = std::min(expiry, ends);
  }
  const PrivateKey private_key(
      PEM_read_bio_PrivateKey(Open(key.text).get(), nullptr, NoPassword, nullptr), EVP_PKEY_free);
  const bool matches = private_key != nullptr &&
                       X509_check_private_key(certificates.front().get(), private_key.get()) == 1;
  ERR_clear_error();
  if (private_key == nullptr) return Problem(key, "holds no private key without a password");
  if (!matches) return Problem(key, absl::StrCat("is not the key of ", chain.name));
  return expiry;
}

absl::Status CheckAuthorities(const PemText& authorities, absl::Time now) {
  PREFILLD_ASSIGN_OR_RETURN(const auto certificates, ParseCertificates(authorities));
  absl::Time last = absl::InfinitePast();
  for (const Certificate& certificate : certificates) {
    last = std::max(last, ToTime(X509_get0_notAfter(certificate.get())));
  }
  if (now < last) return absl::OkStatus();
  return Problem(authorities,
                 absl::StrCat("has expired certificates alone: valid until ", Day(last)));
}

}  // namespace prefilld::wire
