#include "proto/wire/address_pattern.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prefilld::wire {
namespace {

using ::testing::HasSubstr;

TEST(AddressPattern, OfIpv4AddressesTakesNumbersAndNoNames) {
  EXPECT_TRUE(AddressMatches("10.2.*.*:50052", "10.2.3.4:50052"));
  EXPECT_TRUE(AddressMatches("127.0.0.1:*", "127.0.0.1:7000"));
  for (const char* address :
       {"10.2.attacker.example:50052", "10.2.3.example:50052", "10.2.a.b:50052", "10.2.3.4.:50052",
        "10.2.3:50052", "10.2.3.4.example:50052", "10.3.3.4:50052", "10.2.3.4:50053",
        "[::ffff:10.2.3.4]:50052", "10.2.3.0x4:50052", "localhost:50052"}) {
    EXPECT_FALSE(AddressMatches("10.2.*.*:50052", address)) << address;
  }
}

TEST(AddressPattern, OfIpv6AddressesTakesEveryWayToWriteOne) {
  for (const char* address : {"[fd00:1::12]:7000", "[FD00:0001:0:0:0:0:0:12]:7000"}) {
    EXPECT_TRUE(AddressMatches("[fd00:1::*]:7000", address)) << address;
    EXPECT_TRUE(AddressMatches("[fd00:1:*:*:*:*:*:*]:*", address)) << address;
    EXPECT_FALSE(AddressMatches("[fd00:2::*]:7000", address)) << address;
    EXPECT_FALSE(AddressMatches("*.*.*.*:7000", address)) << address;
  }
  EXPECT_FALSE(AddressMatches("[fd00:1::*]:7000", "[fd00:1::1:12]:7000"));
  EXPECT_FALSE(AddressMatches("[::*]:7000", "0.0.0.1:7000"));
}

TEST(AddressPattern, OfNamesTakesNamesLabelByLabel) {
  EXPECT_TRUE(AddressMatches("worker:7000", "worker:7000"));
  EXPECT_TRUE(AddressMatches("*.pods:7000", "Worker-3.PODS.:7000"));
  EXPECT_TRUE(AddressMatches("w*k*r-*:7000", "worker-12:7000"));
  EXPECT_TRUE(AddressMatches("10.*.pods:7000", "10.2.pods:7000"));
  EXPECT_FALSE(AddressMatches("worker:7000", "worker:70000"));
  EXPECT_FALSE(AddressMatches("*.pods:7000", "worker-3.pods:7001"));
  EXPECT_FALSE(AddressMatches("*.pods:7000", "evil.example.pods:7000"));
  EXPECT_FALSE(AddressMatches("worker-*:7000", "worker-1.evil.example:7000"));
  EXPECT_FALSE(AddressMatches("*a:7000", "10.2.3.4:7000"));
  EXPECT_FALSE(AddressMatches("worker-*", "worker-1:7000"));
  EXPECT_FALSE(AddressMatches("", "x:1"));
}

TEST(AddressPattern, OfUnixSocketsTakesPathsAlone) {
  EXPECT_TRUE(AddressMatches("unix:/run/*.sock", "unix:/run/decode.sock"));
  EXPECT_FALSE(AddressMatches("unix:/run/*.sock", "unix:/run/a/b.sock"));
  EXPECT_FALSE(AddressMatches("unix:/run/*.sock", "unix:/etc/decode.sock"));
  EXPECT_FALSE(AddressMatches("*:*", "unix:/run/decode.sock"));
}

TEST(AddressPattern, HasOneOfTheFourForms) {
  for (const char* pattern : {"worker:7000", "*.pods:50052", "10.2.*.*:*", "[fd00::*]:7000",
                              "[*:*:*:*:*:*:*:*]:1", "worker-*:7000", "unix:/run/*.sock"}) {
    EXPECT_EQ(AddressPatternProblem(pattern), std::nullopt) << pattern;
  }
  for (const char* pattern :
       {"", "*", "*.pods", "worker:", "dns:///*:80", "*:port", "*:80", "10.2.*:80", "10.2.1*.*:80",
        "10.2.3.400:80", "10.2.*.e*:80", "*.*:80", "worker.*:80", "[fd00::1::2]:80", "[fd00:*]:80",
        "[::10.2.3.4]:80", "fd00::*:80", "unix:run/x", "[fd0*::]:80"}) {
    EXPECT_NE(AddressPatternProblem(pattern), std::nullopt) << pattern;
  }
  EXPECT_THAT(*AddressPatternProblem("10.2.*\n:80"), HasSubstr("'10.2.*\\n:80' is no pattern"));
}

}  // namespace
}  // namespace prefilld::wire
