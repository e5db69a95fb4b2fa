#ifndef PREFILLD_TESTS_PROTO_TEST_CERTIFICATE_H_
#define PREFILLD_TESTS_PROTO_TEST_CERTIFICATE_H_

#include <string>

#include "absl/time/time.h"

namespace prefilld {

// A key and a self-signed certificate for 127.0.0.1 and localhost, in a folder that is removed with
// this object. A peer that trusts the certificate trusts its holder as server and as client.
class TestCertificate {
 public:
  // The certificate is valid between these times from now.
  explicit TestCertificate(absl::Duration starts = -absl::Hours(1),
                           absl::Duration ends = absl::Hours(24));
  ~TestCertificate();
  TestCertificate(const TestCertificate&) = delete;
  TestCertificate& operator=(const TestCertificate&) = delete;

  // Puts the files of another certificate in the place of ours.
  void ReplaceWith(const TestCertificate& other) const;

  std::string cert_file() const { return folder_ + "/cert.pem"; }
  std::string key_file() const { return folder_ + "/key.pem"; }

 private:
  std::string folder_;
};

}  // namespace prefilld

#endif  // PREFILLD_TESTS_PROTO_TEST_CERTIFICATE_H_
