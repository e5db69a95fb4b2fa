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
  for (const char* text :
       {"", ":", "host", "host:", ":80", "host:65536", "host:-1", "host:8o", "host:123456",
        "unix:/run/socket", "dns:///host:80", "::1:80", "[]:80", "[::1]", "[host]:80", "a b:80",
        "host:80/path", "host,other:80", "host%0a:80"}) {
    EXPECT_FALSE(ParseHostPort(text).has_value()) << text;
  }
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

TEST(AddressPattern, StarStandsForAnyRunOfCharactersWithinOneLabel) {
  EXPECT_TRUE(AddressMatches("worker:7000", "worker:7000"));
  EXPECT_TRUE(AddressMatches("*.pods:7000", "worker-3.pods:7000"));
  EXPECT_TRUE(AddressMatches("10.0.*.*:*", "10.0.3.4:7000"));
  EXPECT_TRUE(AddressMatches("w*k*r-*:7000", "worker-12:7000"));
  EXPECT_TRUE(AddressMatches("[fd00::*]:7000", "[fd00::12]:7000"));
  EXPECT_FALSE(AddressMatches("worker:7000", "worker:70000"));
  EXPECT_FALSE(AddressMatches("*.pods:7000", "worker-3.pods:7001"));
  EXPECT_FALSE(AddressMatches("", "x:1"));
}

TEST(AddressPattern, StarCrossesNeitherDotsNorColons) {
  EXPECT_FALSE(AddressMatches("*.pods:7000", "evil.example.pods:7000"));
  EXPECT_FALSE(AddressMatches("10.0.*:7000", "10.0.3.4:7000"));
  EXPECT_FALSE(AddressMatches("worker-*:7000", "worker-1.evil.example:7000"));
  EXPECT_FALSE(AddressMatches("worker-*", "worker-1:7000"));
  EXPECT_FALSE(AddressMatches("[fd00:*]:7000", "[fd00:1:2]:7000"));
  EXPECT_FALSE(AddressMatches("*:*", "::1:80"));
}

TEST(AddressPattern, HasTheFormOfAnAddress) {
  for (const char* pattern : {"worker:7000", "*.pods:50052", "10.2.*.*:*", "[fd00::*]:7000"}) {
    EXPECT_TRUE(IsAddressPattern(pattern)) << pattern;
  }
  for (const char* pattern : {"", "*", "*.pods", "worker:", "dns:///*:80", "*:port"}) {
    EXPECT_FALSE(IsAddressPattern(pattern)) << pattern;
  }
}

}  // namespace
}  // namespace prefilld::wire
