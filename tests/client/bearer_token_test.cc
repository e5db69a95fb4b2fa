#include "client/bearer_token.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "client/prefill_client.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/client/scripted_server.h"

namespace prefilld::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

class BearerTokenTest : public ::testing::Test {
 protected:
  BearerTokenTest() {
    folder_ = (std::filesystem::temp_directory_path() / "prefilld-token-XXXXXX").string();
    if (mkdtemp(folder_.data()) == nullptr) abort();
    Write("sesame\n", std::chrono::seconds(10));
  }
  ~BearerTokenTest() override { std::filesystem::remove_all(folder_); }

  std::string path() const { return folder_ + "/token"; }
  // Puts a file in the token's place that was last written so long ago.
  void Write(const std::string& content, std::chrono::seconds age) const {
    const std::string fresh = folder_ + "/new";
    std::ofstream(fresh) << content;
    std::filesystem::last_write_time(fresh, std::filesystem::file_time_type::clock::now() - age);
    std::filesystem::rename(fresh, path());
  }

  // Returns what a call shows that is made late enough to look at the file.
  std::string NextLook(BearerToken& token) {
    now_ += absl::Seconds(1);
    return token.Authorization(now_);
  }

  std::string folder_;
  absl::Time now_ = absl::Now();
};

TEST_F(BearerTokenTest, OfAChangedFileCountsOnceItHasRested) {
  const auto token = BearerToken::Read(path());
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(NextLook(**token), "Bearer sesame");
  Write("barley", std::chrono::seconds(0));
  EXPECT_EQ(NextLook(**token), "Bearer sesame");
  Write("barley", std::chrono::seconds(10));
  EXPECT_EQ((*token)->Authorization(now_), "Bearer sesame") << "one look a second is enough";
  EXPECT_EQ(NextLook(**token), "Bearer barley");
}

// Nobody opens the other end of the pipe, so whoever reads it waits.
TEST_F(BearerTokenTest, InAFileThatHangsHoldsUpOneCallAndNoOther) {
  const auto token = BearerToken::Read(path());
  ASSERT_TRUE(token.ok()) << token.status();
  EXPECT_EQ(NextLook(**token), "Bearer sesame");
  std::filesystem::remove(path());
  ASSERT_EQ(mkfifo(path().c_str(), 0600), 0);
  const timespec long_ago[2] = {{.tv_sec = 1'000'000'000, .tv_nsec = 0},
                                {.tv_sec = 1'000'000'000, .tv_nsec = 0}};
  ASSERT_EQ(utimensat(AT_FDCWD, path().c_str(), long_ago, 0), 0);
  std::atomic<bool> looked = false;
  std::thread first([&, at = now_ + absl::Seconds(1)] {
    (*token)->Authorization(at);
    looked = true;
  });
  // Once the other end can be opened without a wait, the first call waits in the file.
  int writer = -1;
  while (writer < 0) writer = open(path().c_str(), O_WRONLY | O_NONBLOCK | O_CLOEXEC);
  EXPECT_EQ((*token)->Authorization(now_ + absl::Seconds(10)), "Bearer sesame");
  EXPECT_FALSE(looked);
  close(writer);
  first.join();
}

TEST_F(BearerTokenTest, StaysWhenItsFileHoldsNone) {
  const auto token = BearerToken::Read(path());
  ASSERT_TRUE(token.ok()) << token.status();
  for (const std::string& content :
       {std::string(), std::string("two words"), std::string("\x01"), std::string(9000, 'x')}) {
    Write(content, std::chrono::seconds(10));
    EXPECT_EQ(NextLook(**token), "Bearer sesame");
    EXPECT_THAT(std::string(BearerToken::Read(path()).status().message()),
                HasSubstr("holds no token"));
  }
  std::filesystem::remove(path());
  EXPECT_EQ(NextLook(**token), "Bearer sesame");
}

TEST_F(BearerTokenTest, DoesNotGoInPlainTextUnasked) {
  ChannelOptions options = {.address = "", .token_file = path()};
  const absl::Status refused =
      PrefillClient::Create(options, {"unix:/run/prefilld.sock", "127.0.0.1:1"}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("127.0.0.1:1 in plain text"));
  EXPECT_TRUE(PrefillClient::Create(options, {"unix:/run/prefilld.sock"}).ok());
  options.token_without_tls = true;
  EXPECT_TRUE(PrefillClient::Create(options, {"127.0.0.1:1"}).ok());
  options.token_without_tls = false;
  options.tls = wire::ChannelTls();
  EXPECT_TRUE(PrefillClient::Create(options, {"127.0.0.1:1"}).ok());
}

TEST_F(BearerTokenTest, GoesWithEachCallButNotBesideAnother) {
  absl::Mutex mu;
  std::vector<std::string> seen;
  ScriptedServer server([&](grpc::ServerContext& context, const auto&, PrefillWriter&) {
    const auto [first, last] = context.client_metadata().equal_range("authorization");
    absl::MutexLock lock(&mu);
    for (auto entry = first; entry != last; ++entry) {
      seen.emplace_back(entry->second.data(), entry->second.size());
    }
    return grpc::Status(grpc::StatusCode::INVALID_ARGUMENT, "seen");
  });
  const auto client = PrefillClient::Create(
      {.address = server.address(), .token_file = path(), .token_without_tls = true});
  ASSERT_TRUE(client.ok()) << client.status();
  class : public KvSink {
    absl::Status OnAccepted(const ::prefill::v1::Accepted&) override { return absl::OkStatus(); }
    absl::Status OnProgress(const ::prefill::v1::Progress&) override { return absl::OkStatus(); }
    absl::Status OnFrame(const wire::ReceivedFrame&) override { return absl::OkStatus(); }
  } sink;
  EXPECT_EQ((*client)->Prefill(SmallRequest(), sink).status().message(), "seen");
  EXPECT_EQ((*client)
                ->Prefill(SmallRequest(), sink, {.metadata = {{"authorization", "Bearer own"}}})
                .status()
                .message(),
            "seen");
  absl::MutexLock lock(&mu);
  EXPECT_THAT(seen, ElementsAre("Bearer sesame", "Bearer own"));
}

}  // namespace
}  // namespace prefilld::client
