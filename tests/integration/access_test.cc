// Tests who gets into a real server and who does not: tokens, certificates, plain text, messages
// that are far too long. Each refusal has its status and its counter, and the next request is
// served.
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/config.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "prefill/v1/prefill.grpc.pb.h"
#include "tests/integration/access_server.h"
#include "tests/integration/metrics_page.h"

namespace prefilld::integration {
namespace {

using ::testing::HasSubstr;

constexpr char kFruitless[] = "prefilld_connections_fruitless_total";

// Sanitizers keep memory that was freed.
#if defined(ABSL_HAVE_ADDRESS_SANITIZER) || defined(ABSL_HAVE_THREAD_SANITIZER)
constexpr bool kFreedMemoryIsKept = true;
#else
constexpr bool kFreedMemoryIsKept = false;
#endif

class Access : public ::testing::Test {
 protected:
  static void SetUpTestSuite() { server_ = new AccessServer; }
  static void TearDownTestSuite() {
    delete server_;
    server_ = nullptr;
  }

  static absl::Status CallAsOurs() { return server_->CallWith(server_->Options(Token())); }
  static std::string Token() { return server_->Path("token"); }
  // Makes a call that gRPC's own credentials carry, because ours refuse files that cannot work.
  static grpc::Status CallOver(const std::shared_ptr<grpc::ChannelCredentials>& credentials) {
    const auto stub = ::prefill::v1::PrefillService::NewStub(
        grpc::CreateChannel(server_->process().address(), credentials));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + kSoon));
    ::prefill::v1::ServerInfo info;
    return stub->GetServerInfo(&context, {}, &info);
  }
  // The message is made of one slice again and again, so that this side needs no memory for it.
  static grpc::Status SendGibibyte() {
    const grpc::Slice mebibyte(std::string(1 << 20, '\1'));
    const std::vector<grpc::Slice> slices(1024, mebibyte);
    grpc::ByteBuffer message(slices.data(), slices.size());
    grpc::GenericStub stub(
        grpc::CreateChannel(server_->process().address(), server_->Showing(server_->caller)));
    grpc::ClientContext context;
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(60)));
    grpc::CompletionQueue queue;
    auto call = stub.PrepareUnaryCall(&context, "/prefill.v1.PrefillService/GetServerInfo", message,
                                      &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    void* tag = nullptr;
    bool ok = false;
    call->Finish(&response, &status, &queue);
    queue.Next(&tag, &ok);
    return status;
  }
  // `field` is VmRSS, or VmHWM for the most that it has been.
  static int64_t MemoryMb(absl::string_view field) {
    std::ifstream status(absl::StrCat("/proc/", server_->process().pid(), "/status"));
    for (std::string line; std::getline(status, line);) {
      absl::string_view value = line;
      int64_t kilobytes = 0;
      if (absl::ConsumePrefix(&value, absl::StrCat(field, ":")) &&
          absl::ConsumeSuffix(&value, "kB") && absl::SimpleAtoi(value, &kilobytes)) {
        return kilobytes >> 10;
      }
    }
    ADD_FAILURE() << "no " << field;
    return -1;
  }

  static AccessServer* server_;
};

AccessServer* Access::server_ = nullptr;

TEST_F(Access, ATokenCountsBesideTheCertificateOfItsTenantAlone) {
  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
  for (const std::string token : {"", "sesam", kSesameHash}) {
    EXPECT_EQ(server_->CallWithToken(token).code(), absl::StatusCode::kUnauthenticated) << token;
  }
  EXPECT_EQ(server_->Metric("prefilld_refusals_total{cause=\"unauthenticated\"}"), 3);

  const absl::Status foreign = server_->CallWithToken("other");
  EXPECT_EQ(foreign.code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(foreign.message()), HasSubstr("certificate's name 'localhost'"));
  EXPECT_EQ(server_->Metric("prefilld_refusals_total{cause=\"certificate\"}"), 1);

  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
  // The server counts and logs a call after its caller has the end of it.
  EXPECT_TRUE(server_->SoonAtLeast("prefilld_tenant_requests_total{tenant=\"ours\"}", 2));
  std::string log;
  const absl::Time deadline = absl::Now() + kSoon;
  do {
    log = server_->process().stderr_text();
  } while (log.find("\"tenant\":\"ours\"") == std::string::npos && absl::Now() < deadline);
  EXPECT_THAT(log, HasSubstr("\"certificate\":\"localhost\",\"user_agent\":\"grpc"));
  EXPECT_THAT(log, HasSubstr("\"tenant\":\"ours\""));
  EXPECT_EQ(log.find("sesam"), std::string::npos) << "no token is in the log";
}

TEST_F(Access, ThePageOfMetricsHasTenantsAndNoTokens) {
  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
  EXPECT_EQ(server_->CallWithToken("sesam").code(), absl::StatusCode::kUnauthenticated);
  EXPECT_TRUE(server_->SoonAtLeast("prefilld_tenant_requests_total{tenant=\"ours\"}", 1));
  const std::string page = MetricsPage(server_->process().metrics_address()).text();
  EXPECT_THAT(page, HasSubstr("tenant=\"ours\""));
  for (const char* secret : {"sesam", "bearer", "Bearer", kSesameHash}) {
    EXPECT_EQ(page.find(secret), std::string::npos) << secret;
  }
}

TEST_F(Access, AnExpiredCertificateAndPlainTextGetNoConnectionAndAreCounted) {
  EXPECT_TRUE(CallOver(server_->Showing(server_->caller)).ok());
  const double before = server_->Metric(kFruitless);
  EXPECT_EQ(CallOver(server_->Showing(server_->expired)).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(server_->SoonAtLeast(kFruitless, before + 1));
  const double expired = server_->Metric(kFruitless);
  EXPECT_EQ(CallOver(grpc::InsecureChannelCredentials()).error_code(),
            grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(server_->SoonAtLeast(kFruitless, expired + 1));
  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
}

// Two messages take the quota for requests in receipt, 256 MiB, each while they come. The allocator
// keeps a part of it, and the memory of neither whole.
TEST_F(Access, AMessageOfAGibibyteIsRefusedAndItsMemoryComesBack) {
  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
  const int64_t before = MemoryMb("VmRSS");
  const grpc::Status first = SendGibibyte();
  EXPECT_EQ(first.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED) << first.error_message();
  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
  EXPECT_EQ(SendGibibyte().error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(CallAsOurs(), absl::OkStatus());
  EXPECT_TRUE(server_->SoonAtLeast("prefilld_requests_broken_off_total", 2));
  if (kFreedMemoryIsKept) return;
  const absl::Time deadline = absl::Now() + absl::Seconds(10);
  // The allocator gives back what it keeps while the server goes on working.
  while (MemoryMb("VmRSS") > before + 200 && absl::Now() < deadline) {
    EXPECT_EQ(CallAsOurs(), absl::OkStatus());
    absl::SleepFor(absl::Milliseconds(50));
  }
  const int64_t after_two = MemoryMb("VmRSS"), most = MemoryMb("VmHWM");
  RecordProperty("resident_mb",
                 absl::StrCat(before, " before, ", after_two, " after two, at most ", most));
  EXPECT_LE(after_two, before + 200);
  EXPECT_LT(most, before + 512) << "the quota for requests in receipt, 256 MiB, and as much again";
}

}  // namespace
}  // namespace prefilld::integration
