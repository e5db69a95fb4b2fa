#include "tests/proto/test_certificate.h"

#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/x509v3.h>
#include <stdlib.h>

#include <cstdio>
#include <filesystem>
#include <memory>

namespace prefilld {
namespace {

using Key = std::unique_ptr<EVP_PKEY, decltype(&EVP_PKEY_free)>;
using Certificate = std::unique_ptr<X509, decltype(&X509_free)>;
using File = std::unique_ptr<FILE, decltype(&fclose)>;

void AddExtension(X509* certificate, int nid, const char* value) {
  X509V3_CTX context;
  X509V3_set_ctx_nodb(&context);
  X509V3_set_ctx(&context, certificate, certificate, nullptr, nullptr, 0);
  X509_EXTENSION* extension = X509V3_EXT_conf_nid(nullptr, &context, nid, value);
  if (extension == nullptr || X509_add_ext(certificate, extension, -1) != 1) abort();
  X509_EXTENSION_free(extension);
}

Certificate SelfSigned(EVP_PKEY* key, absl::Duration starts, absl::Duration ends) {
  Certificate certificate(X509_new(), X509_free);
  X509* x = certificate.get();
  X509_set_version(x, 2);  // X.509 v3
  ASN1_INTEGER_set(X509_get_serialNumber(x), 1);
  X509_gmtime_adj(X509_getm_notBefore(x), absl::ToInt64Seconds(starts));
  X509_gmtime_adj(X509_getm_notAfter(x), absl::ToInt64Seconds(ends));
  X509_set_pubkey(x, key);
  X509_NAME* name = X509_get_subject_name(x);
  X509_NAME_add_entry_by_txt(name, "CN", MBSTRING_ASC,
                             reinterpret_cast<const unsigned char*>("localhost"), -1, -1, 0);
  X509_set_issuer_name(x, name);
  AddExtension(x, NID_basic_constraints, "critical,CA:TRUE");
  // Several of these in one bundle have the same name, and are told apart by their keys.
  AddExtension(x, NID_subject_key_identifier, "hash");
  AddExtension(x, NID_authority_key_identifier, "keyid:always");
  AddExtension(x, NID_subject_alt_name, "IP:127.0.0.1,DNS:localhost");
  if (X509_sign(x, key, EVP_sha256()) == 0) abort();
  return certificate;
}

}  // namespace

TestCertificate::TestCertificate(absl::Duration starts, absl::Duration ends) {
  folder_ = (std::filesystem::temp_directory_path() / "prefilld-tls-XXXXXX").string();
  if (mkdtemp(folder_.data()) == nullptr) abort();
  const Key key(EVP_EC_gen("P-256"), EVP_PKEY_free);
  const Certificate certificate = SelfSigned(key.get(), starts, ends);
  const File cert_out(fopen(cert_file().c_str(), "w"), fclose);
  const File key_out(fopen(key_file().c_str(), "w"), fclose);
  if (!PEM_write_X509(cert_out.get(), certificate.get()) ||
      !PEM_write_PrivateKey(key_out.get(), key.get(), nullptr, nullptr, 0, nullptr, nullptr)) {
    abort();
  }
}

void TestCertificate::ReplaceWith(const TestCertificate& other) const {
  const auto overwrite = std::filesystem::copy_options::overwrite_existing;
  std::filesystem::copy_file(other.cert_file(), cert_file(), overwrite);
  std::filesystem::copy_file(other.key_file(), key_file(), overwrite);
}

TestCertificate::~TestCertificate() {
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

}  // namespace prefilld
