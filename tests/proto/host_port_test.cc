#include "proto/wire/host_port.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prefilld::wire {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TEST(HostPort, TakesNamesAndAddresses) {
  EXPECT_EQ(ParseHostPort("worker-3.pods.svc:7000")->host, "worker-3.pods.svc");
  EXPECT_EQ(ParseHostPort("10.0.0.1:0")->port, 0);
  EXPECT_EQ(ParseHostPort("[2001:db8::1]:65535")->host, "2001:db8::1");
}

TEST(HostPort, RefusesEverythingElse) {
  for (const char* text : {"",
                           ":",
                           "host",
                           "host:",
                           ":80",
                           "host:65536",
                           "host:-1",
                           "host:8o",
                           "host:123456",
                           "unix:/run/socket",
                           "dns:///host:80",
                           "::1:80",
                           "[]:80",
                           "[::1]",
                           "[host]:80",
                           "a b:80",
                           "host:80/path",
                           "host,other:80",
                           "host%0a:80",
                           "a..b:80",
                           ".a:80",
                           "[::1%lo]:80"}) {
    EXPECT_FALSE(ParseHostPort(text).has_value()) << text;
  }
}

TEST(HostPort, AHostThatEndsInANumberIsAnIpv4AddressOrNothing) {
  EXPECT_FALSE(ParseHostPort("10.2.3.4:80")->is_name);
  EXPECT_FALSE(ParseHostPort("[::1]:80")->is_name);
  EXPECT_TRUE(ParseHostPort("10.2.3.example.:80")->is_name);
  for (const char* text : {"10.2.3:80", "167903492:80", "10.2.3.256:80", "10.2.3.4.5:80",
                           "evil.example.7:80", "0x0a.2.3.0x4:80", "10.2.3.4.:80"}) {
    EXPECT_FALSE(ParseHostPort(text).has_value()) << text;
  }
}

TEST(UnixSocket, IsAnAbsolutePathThatFits) {
  EXPECT_EQ(UnixSocketPath("unix:/run/prefilld.sock"), "/run/prefilld.sock");
  EXPECT_TRUE(UnixSocketPath("unix:/" + std::string(106, 'a')).has_value());
  for (const std::string& text : {std::string("unix:run/x"), std::string("/run/x"),
                                  std::string("unix:"), std::string("unix:///run/x y"),
                                  std::string("unix:/a,b"), "unix:/" + std::string(107, 'a')}) {
    EXPECT_FALSE(UnixSocketPath(text).has_value()) << text;
  }
  EXPECT_EQ(ListenOrUnixProblem("--listen", "unix:/run/x"), std::nullopt);
  EXPECT_EQ(DialAddressProblem("--server", "unix:/run/x"), std::nullopt);
  EXPECT_NE(ListenAddressProblem("--metrics_listen", "unix:/run/x"), std::nullopt);
}

TEST(AddressProblem, NamesSettingValueAndForm) {
  EXPECT_EQ(ListenAddressProblem("--listen", "0.0.0.0:0"), std::nullopt);
  EXPECT_EQ(DialAddressProblem("--server", "localhost:50051"), std::nullopt);
  EXPECT_THAT(
      *DialAddressProblem("--server", "127.0.0.1:"),
      AllOf(HasSubstr("--server=127.0.0.1: is not host:port"), HasSubstr("port from 1 to")));
  EXPECT_NE(DialAddressProblem("--server", "localhost:0"), std::nullopt);
  EXPECT_THAT(*ListenAddressProblem("--listen", "a\nb"), HasSubstr("--listen=a\\nb is"));
}

}  // namespace
}  // namespace prefilld::wire
