#include "server/host_port.h"

#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

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

TEST(Pattern, StarStandsForAnyRunOfCharacters) {
  EXPECT_TRUE(MatchesPattern("worker:7000", "worker:7000"));
  EXPECT_TRUE(MatchesPattern("*.pods:7000", "worker-3.pods:7000"));
  EXPECT_TRUE(MatchesPattern("10.0.*:*", "10.0.3.4:7000"));
  EXPECT_TRUE(MatchesPattern("a*b*c", "a-b-b-c"));
  EXPECT_TRUE(MatchesPattern("*", ""));
  EXPECT_FALSE(MatchesPattern("worker:7000", "worker:70000"));
  EXPECT_FALSE(MatchesPattern("*.pods:7000", "worker-3.pods:7001"));
  EXPECT_FALSE(MatchesPattern("10.0.*:7000", "110.0.0.1:7000"));
  EXPECT_FALSE(MatchesPattern("", "x"));
}

}  // namespace
}  // namespace prefilld::server
