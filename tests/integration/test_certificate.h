#ifndef PREFILLD_TESTS_INTEGRATION_TEST_CERTIFICATE_H_
#define PREFILLD_TESTS_INTEGRATION_TEST_CERTIFICATE_H_

#include <string>

namespace prefilld::integration {

// A key and a self-signed certificate for 127.0.0.1, in a folder that is removed with this object.
// A peer that trusts the certificate trusts its holder as server and as client.
class TestCertificate {
 public:
  TestCertificate();
  ~TestCertificate();
  TestCertificate(const TestCertificate&) = delete;
  TestCertificate& operator=(const TestCertificate&) = delete;

  std::string cert_file() const { return folder_ + "/cert.pem"; }
  std::string key_file() const { return folder_ + "/key.pem"; }

 private:
  std::string folder_;
};

}  // namespace prefilld::integration

#endif  // PREFILLD_TESTS_INTEGRATION_TEST_CERTIFICATE_H_
