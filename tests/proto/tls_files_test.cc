#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "proto/wire/tls.h"
#include "tests/proto/test_certificate.h"

namespace prefilld::wire {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string FileWith(const std::string& name, const std::string& text) {
  const std::string path = ::testing::TempDir() + name;
  std::ofstream(path) << text;
  return path;
}

std::vector<std::string> Problems(const ServerTls& tls) {
  std::vector<std::string> problems;
  CheckServerTls(tls, problems);
  return problems;
}

ServerTls Files(const TestCertificate& own) {
  return {.cert_file = own.cert_file(), .key_file = own.key_file(), .client_ca_file = ""};
}

TEST(ReadPemFile, ReadsTheWholeFileAndNamesOneThatItCannot) {
  EXPECT_EQ(*ReadPemFile("--tls_cert", FileWith("some.pem", "PEM")), "PEM");
  EXPECT_EQ(*ReadPemFile("--tls_cert", ""), "");
  for (const char* path : {"/no/such.pem", "/", "/dev/null"}) {
    const absl::Status status = ReadPemFile("--tls_cert", path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), std::string("--tls_cert ") + path + " cannot be read");
  }
}

TEST(CheckServerTls, ListsEveryProblemWithItsFlag) {
  const TestCertificate own;
  EXPECT_THAT(Problems({}), IsEmpty());
  EXPECT_THAT(Problems(Files(own)), IsEmpty());
  EXPECT_THAT(Problems({.cert_file = "/no/such.pem", .key_file = "", .client_ca_file = ""}),
              ElementsAre(HasSubstr("--tls_cert and --tls_key belong together"),
                          "--tls_cert=/no/such.pem cannot be read"));
  EXPECT_THAT(Problems({.cert_file = "", .key_file = "", .client_ca_file = own.cert_file()}),
              ElementsAre("--tls_client_ca needs --tls_cert and --tls_key"));
}

TEST(CheckServerTls, TellsWhatCannotBeServedNow) {
  const TestCertificate own, other;
  const TestCertificate past(-absl::Hours(48), -absl::Hours(24));
  const TestCertificate future(absl::Hours(24), absl::Hours(48));
  EXPECT_THAT(Problems(Files(past)),
              ElementsAre(HasSubstr(
                  absl::StrCat("--tls_cert=", past.cert_file(), " has expired: valid until 20"))));
  EXPECT_THAT(Problems(Files(future)),
              ElementsAre(HasSubstr(
                  absl::StrCat("--tls_cert=", future.cert_file(), " is valid only from 20"))));
  ServerTls files = Files(own);
  files.key_file = other.key_file();
  EXPECT_THAT(Problems(files),
              ElementsAre(absl::StrCat("--tls_key=", other.key_file(),
                                       " is not the key of --tls_cert=", own.cert_file())));
  files.key_file = own.cert_file();
  EXPECT_THAT(Problems(files), ElementsAre(HasSubstr("holds no private key without a password")));
  files = Files(own);
  files.cert_file = own.key_file();
  EXPECT_THAT(Problems(files),
              ElementsAre(absl::StrCat("--tls_cert=", own.key_file(), " holds no certificate")));
}

TEST(CheckServerTls, AuthoritiesAreThereAndNotAllOfThePast) {
  const TestCertificate own;
  const TestCertificate past(-absl::Hours(48), -absl::Hours(24));
  ServerTls files = Files(own);
  const auto problems_with = [&](const std::string& client_ca_file) {
    files.client_ca_file = client_ca_file;
    return Problems(files);
  };
  EXPECT_THAT(problems_with(own.cert_file()), IsEmpty());
  EXPECT_THAT(problems_with(FileWith("blank.pem", "\n# none yet\n")),
              ElementsAre(HasSubstr("/blank.pem holds no certificate")));
  EXPECT_THAT(problems_with(past.cert_file()),
              ElementsAre(HasSubstr("has expired certificates alone: valid until 20")));
  EXPECT_THAT(problems_with(FileWith("both.pem", *ReadPemFile("", past.cert_file()) +
                                                     *ReadPemFile("", own.cert_file()))),
              IsEmpty());
  EXPECT_THAT(problems_with(FileWith("damaged.pem", *ReadPemFile("", own.cert_file()) +
                                                        "-----BEGIN CERTIFICATE-----\nAAAA\n"
                                                        "-----END CERTIFICATE-----\n")),
              ElementsAre(HasSubstr("has a certificate that cannot be parsed, after 1 that can")));
}

TEST(ServerTls, TellsItsMode) {
  EXPECT_STREQ(ServerTls().mode(), "off");
  EXPECT_STREQ((ServerTls{.cert_file = "c", .key_file = "k", .client_ca_file = ""}).mode(), "on");
  EXPECT_STREQ((ServerTls{.cert_file = "c", .key_file = "k", .client_ca_file = "a"}).mode(),
               "mutual");
}

TEST(ChannelCredentials, WithoutFilesTheyArePlainText) {
  EXPECT_TRUE(MakeChannelCredentials(std::nullopt).ok());
}

TEST(ChannelCredentials, NameTheFileThatIsOfNoUse) {
  const TestCertificate own;
  const TestCertificate past(-absl::Hours(48), -absl::Hours(24));
  const auto problem = [](const ChannelTls& tls) {
    return std::string(MakeChannelCredentials(tls).status().message());
  };
  EXPECT_EQ(problem({.ca_file = own.cert_file(),
                     .cert_file = own.cert_file(),
                     .key_file = own.key_file(),
                     .server_name = ""}),
            "");
  EXPECT_THAT(
      problem({.ca_file = "/no/ca.pem", .cert_file = "", .key_file = "", .server_name = ""}),
      HasSubstr("ca_file /no/ca.pem"));
  EXPECT_THAT(problem({.ca_file = FileWith("blank.pem", "\n"),
                       .cert_file = "",
                       .key_file = "",
                       .server_name = ""}),
              HasSubstr("blank.pem holds no certificate"));
  EXPECT_THAT(
      problem({.ca_file = "", .cert_file = own.cert_file(), .key_file = "", .server_name = ""}),
      HasSubstr("cert_file and key_file go together"));
  EXPECT_THAT(problem({.ca_file = "",
                       .cert_file = past.cert_file(),
                       .key_file = past.key_file(),
                       .server_name = ""}),
              HasSubstr("has expired"));
}

}  // namespace
}  // namespace prefilld::wire
