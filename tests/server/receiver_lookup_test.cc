#include "server/receiver_lookup.h"

#include <future>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "absl/synchronization/notification.h"

namespace prefilld::server {
namespace {

using ::testing::AnyOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;

TEST(ReceiverLookup, FindsEveryAddressOfAName) {
  EXPECT_THAT(ReceiverLookup::Resolve("localhost"), Contains(AnyOf("127.0.0.1", "::1")));
  EXPECT_THAT(ReceiverLookup::Resolve("no.such.host.invalid"), IsEmpty());
}

TEST(ReceiverLookup, LooksUpNamesAlone) {
  std::vector<std::string> hosts;
  std::promise<void> done;
  ReceiverLookup lookup([&](const std::string& host) {
    hosts.push_back(host);
    if (hosts.size() == 2) done.set_value();
    return std::vector<std::string>();
  });
  for (const char* receiver :
       {"10.2.3.4:1", "a.pods:1", "[::1]:1", "unix:/run/x", "nonsense", "b.pods:1"}) {
    lookup.Log("r", receiver);
  }
  ASSERT_EQ(done.get_future().wait_for(std::chrono::seconds(10)), std::future_status::ready);
  EXPECT_THAT(hosts, ElementsAre("a.pods", "b.pods"));
}

// Neither a push nor the end of the server waits for a name server that does not answer.
TEST(ReceiverLookup, NobodyWaitsForALookUp) {
  auto release = std::make_shared<absl::Notification>();
  {
    ReceiverLookup lookup([release](const std::string&) {
      release->WaitForNotification();
      return std::vector<std::string>();
    });
    for (int i = 0; i < 1000; ++i) lookup.Log("r", "a.pods:1");
  }
  release->Notify();
}

}  // namespace
}  // namespace prefilld::server
