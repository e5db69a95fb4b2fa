#include "proto/wire/listener.h"

#include <chrono>
#include <string>

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <grpcpp/server.h>
#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"
#include "proto/wire/channel.h"

namespace prefilld::wire {
namespace {

using ::testing::HasSubstr;

ListenOptions Options(int port) {
  return {.address = absl::StrCat("127.0.0.1:", port),
          .tls = {},
          .max_request_bytes = 1 << 20,
          .max_streams = 4};
}

bool Connects(int port) {
  const auto channel = OpenChannel({.address = absl::StrCat("127.0.0.1:", port)});
  return channel.ok() &&
         (*channel)->WaitForConnected(std::chrono::system_clock::now() + std::chrono::seconds(5));
}

TEST(Listen, ServesHealthOnThePortThatItTells) {
  const auto listener = Listener::Create(Options(0), {});
  ASSERT_TRUE(listener.ok()) << listener.status();
  EXPECT_GT((*listener)->port(), 0);
  EXPECT_NE((*listener)->server().GetHealthCheckService(), nullptr);
  EXPECT_TRUE(Connects((*listener)->port()));
}

TEST(Listen, NoSecondServerSharesThePort) {
  const auto first = Listener::Create(Options(0), {});
  ASSERT_TRUE(first.ok()) << first.status();
  const absl::Status second = Listener::Create(Options((*first)->port()), {}).status();
  EXPECT_EQ(second.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(
      std::string(second.message()),
      HasSubstr(absl::StrCat("--listen=127.0.0.1:", (*first)->port(), " cannot be served")));
}

TEST(Listen, NamesATlsFileThatCannotBeRead) {
  ListenOptions options = Options(0);
  options.tls = {.cert_file = "/no/such.pem", .key_file = "/no/key.pem", .client_ca_file = ""};
  const absl::Status status = Listener::Create(options, {}).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), HasSubstr("--tls_cert /no/such.pem"));
}

}  // namespace
}  // namespace prefilld::wire
