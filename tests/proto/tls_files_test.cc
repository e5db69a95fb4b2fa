#include <fstream>
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "proto/wire/tls.h"

namespace prefilld::wire {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::string PemFile() {
  const std::string path = ::testing::TempDir() + "/certificate.pem";
  std::ofstream(path) << "PEM";
  return path;
}

std::vector<std::string> Problems(const ServerTls& tls) {
  std::vector<std::string> problems;
  CheckServerTls(tls, problems);
  return problems;
}

TEST(ReadPemFile, ReadsTheWholeFileAndNamesOneThatItCannot) {
  EXPECT_EQ(*ReadPemFile("--tls_cert", PemFile()), "PEM");
  EXPECT_EQ(*ReadPemFile("--tls_cert", ""), "");
  for (const char* path : {"/no/such.pem", "/", "/dev/null"}) {
    const absl::Status status = ReadPemFile("--tls_cert", path).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(status.message(), std::string("--tls_cert ") + path + " cannot be read");
  }
}

TEST(CheckServerTls, ListsEveryProblemWithItsFlag) {
  EXPECT_THAT(Problems({}), IsEmpty());
  EXPECT_THAT(Problems({.cert_file = PemFile(), .key_file = PemFile(), .client_ca_file = ""}),
              IsEmpty());
  EXPECT_THAT(Problems({.cert_file = "/no/such.pem", .key_file = "", .client_ca_file = ""}),
              ElementsAre(HasSubstr("--tls_cert and --tls_key belong together"),
                          "--tls_cert=/no/such.pem cannot be read"));
  EXPECT_THAT(Problems({.cert_file = "", .key_file = "", .client_ca_file = PemFile()}),
              ElementsAre("--tls_client_ca needs --tls_cert and --tls_key"));
}

TEST(ServerTls, TellsItsMode) {
  EXPECT_STREQ(ServerTls().mode(), "off");
  EXPECT_STREQ((ServerTls{.cert_file = "c", .key_file = "k", .client_ca_file = ""}).mode(), "on");
  EXPECT_STREQ((ServerTls{.cert_file = "c", .key_file = "k", .client_ca_file = "a"}).mode(),
               "mutual");
}

TEST(Credentials, WithoutFilesTheyArePlainText) {
  EXPECT_TRUE(MakeServerCredentials({}).ok());
  EXPECT_TRUE(MakeChannelCredentials(std::nullopt).ok());
}

TEST(Credentials, NameTheFileThatCannotBeRead) {
  EXPECT_THAT(
      std::string(MakeServerCredentials(
                      {.cert_file = PemFile(), .key_file = "/no/key.pem", .client_ca_file = ""})
                      .status()
                      .message()),
      HasSubstr("--tls_key /no/key.pem"));
  ChannelTls tls;
  tls.ca_file = "/no/ca.pem";
  EXPECT_THAT(std::string(MakeChannelCredentials(tls).status().message()),
              HasSubstr("ca_file /no/ca.pem"));
  tls = {.ca_file = "", .cert_file = PemFile(), .key_file = "", .server_name = ""};
  EXPECT_THAT(std::string(MakeChannelCredentials(tls).status().message()),
              HasSubstr("cert_file and key_file go together"));
}

}  // namespace
}  // namespace prefilld::wire
