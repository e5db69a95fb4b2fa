// Sends ten thousand requests that no client library would send.
#include <fstream>
#include <random>

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>

#include <unistd.h>

#include "absl/base/config.h"
#include "absl/synchronization/mutex.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

// Sanitizers keep freed memory.
#if defined(ABSL_HAVE_ADDRESS_SANITIZER) || defined(ABSL_HAVE_THREAD_SANITIZER)
constexpr bool kMemoryIsOurs = false;
#else
constexpr bool kMemoryIsOurs = true;
#endif

int64_t ResidentBytes() {
  int64_t total_pages = 0, resident_pages = 0;
  std::ifstream("/proc/self/statm") >> total_pages >> resident_pages;
  return resident_pages * sysconf(_SC_PAGESIZE);
}

// Makes calls with raw bytes, a few at a time, and counts how they end.
class RawCaller {
 public:
  explicit RawCaller(const std::string& address)
      : stub_(grpc::CreateChannel(address, grpc::InsecureChannelCredentials())) {}
  ~RawCaller() { WaitForFewerThan(1); }

  void Send(const std::string& method, const std::string& bytes) {
    WaitForFewerThan(16);
    auto* call = new Call;
    call->context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(2)));
    const grpc::Slice slice(bytes);
    call->request = grpc::ByteBuffer(&slice, 1);
    {
      absl::MutexLock lock(&mu_);
      ++open_;
    }
    stub_.UnaryCall(&call->context, method, {}, &call->request, &call->response,
                    [this, call](grpc::Status status) {
                      absl::MutexLock lock(&mu_);
                      --open_;
                      if (status.error_code() == grpc::StatusCode::INVALID_ARGUMENT) {
                        ++invalid_;
                      }
                      delete call;
                    });
  }

  int invalid() {
    WaitForFewerThan(1);
    absl::MutexLock lock(&mu_);
    return invalid_;
  }

 private:
  struct Call {
    grpc::ClientContext context;
    grpc::ByteBuffer request, response;
  };

  void WaitForFewerThan(int calls) {
    absl::MutexLock lock(&mu_);
    const auto few = [&]() ABSL_SHARED_LOCKS_REQUIRED(mu_) { return open_ < calls; };
    mu_.Await(absl::Condition(&few));
  }

  grpc::TemplatedGenericStub<grpc::ByteBuffer, grpc::ByteBuffer> stub_;
  absl::Mutex mu_;
  int open_ ABSL_GUARDED_BY(mu_) = 0;
  int invalid_ ABSL_GUARDED_BY(mu_) = 0;
};

class MalformedRequests : public ServerFixture {
 protected:
  uint32_t Number() {
    const uint32_t edges[] = {0,   1,   2,   15,         16,         17,
                              128, 255, 256, 0x7fffffff, 0x80000000, 0xffffffff};
    return random_() % 2 == 0 ? edges[random_() % 12] : static_cast<uint32_t>(random_());
  }
  float Real() {
    const float edges[] = {0.0f,  -0.0f,  0.5f,     1.0f,      1.5f, -1.0f,
                           1e38f, 1e-45f, INFINITY, -INFINITY, NAN,  100.0f};
    return edges[random_() % 12];
  }
  std::string Bytes(size_t most) {
    std::string bytes(random_() % (most + 1), '\0');
    for (char& c : bytes) c = static_cast<char>(random_());
    return bytes;
  }

  // Makes a request of which at least one field is out of range.
  v1::PrefillRequest RandomFields() {
    v1::PrefillRequest request = PromptOf(1 + static_cast<int>(random_() % 40));
    if (random_() % 2 == 0) request.set_token_ids(0, Number());
    if (random_() % 2 == 0) request.set_request_id(std::string(random_() % 300, 'i'));
    v1::KvLayoutRequest& layout = *request.mutable_layout();
    layout.set_block_tokens(Number());
    layout.set_order(static_cast<v1::KvOrder>(Number()));
    layout.set_dtype(static_cast<v1::DType>(Number()));
    layout.set_scales(static_cast<v1::KvScales>(Number()));
    layout.set_first_head(Number());
    layout.set_num_heads(Number());
    layout.set_first_block(Number());
    v1::Sampling& sampling = *request.mutable_sampling();
    sampling.set_temperature(Real());
    sampling.set_top_p(Real());
    sampling.set_top_k(Number());
    sampling.set_top_logprobs(Number());
    v1::AttentionOptions& attention = *request.mutable_attention();
    attention.set_policy(static_cast<v1::AttentionPolicy>(Number()));
    attention.set_gamma(Real());
    attention.set_tau(Real());
    attention.set_delta(Real());
    attention.set_coverage(Real());
    attention.set_min_budget_tokens(Number());
    if (random_() % 8 == 0) request.mutable_deliver_to()->set_address("a:1");
    request.set_num_lanes(17 + random_() % 1000);
    return request;
  }

  std::mt19937 random_{20260101};
};

TEST_F(MalformedRequests, LeaveTheServerServingAndItsMemoryFlat) {
  StartServer();
  const std::string prefill = "/prefill.v1.PrefillService/Prefill";
  const std::string attach = "/prefill.v1.PrefillService/AttachLane";
  const std::string receive = "/prefill.v1.PrefillService/AttachReceiver";
  const std::string info = "/prefill.v1.PrefillService/GetServerInfo";
  const auto send_thousand = [&](RawCaller& caller) {
    for (int i = 0; i < 400; ++i) caller.Send(prefill, Bytes(200));
    for (int i = 0; i < 50; ++i) caller.Send(i % 2 == 0 ? attach : receive, Bytes(50));
    for (int i = 0; i < 50; ++i) caller.Send(info, Bytes(50));
    for (int i = 0; i < 250; ++i) caller.Send(prefill, RandomFields().SerializeAsString());
    for (int i = 0; i < 250; ++i) {  // a request cut off, or with one byte changed
      v1::PrefillRequest request = PromptOf(30, "cut");
      request.set_num_lanes(1000);
      request.mutable_layout()->set_block_tokens(17);
      std::string bytes = request.SerializeAsString();
      if (i % 2 == 0) {
        bytes.resize(random_() % bytes.size());
      } else {
        bytes[random_() % bytes.size()] ^= static_cast<char>(1 + random_() % 255);
      }
      caller.Send(prefill, bytes);
    }
  };

  RawCaller caller(address());
  send_thousand(caller);  // pools and arenas reach their size
  const int64_t resident_before = ResidentBytes();
  for (int i = 0; i < 9; ++i) send_thousand(caller);
  // Not all are INVALID_ARGUMENT: some ask for lanes of unknown requests, and some are requests for
  // information, where unknown fields are ignored.
  EXPECT_GT(caller.invalid(), 10 * 800);
  EXPECT_TRUE(EverythingIsFree());
  if (kMemoryIsOurs) {
    EXPECT_LT(ResidentBytes() - resident_before, 8 << 20);
  }
  EXPECT_TRUE(Prefill(PromptOf(100)).status.ok());
}

}  // namespace
}  // namespace prefilld::server
