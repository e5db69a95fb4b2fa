// Tests what an operator relies on: logs, signals, addresses and health of both programs.
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "gmock/gmock.h"
#include "grpcpp/channel.h"
#include "grpcpp/client_context.h"
#include "grpcpp/completion_queue.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "prefill/v1/prefill.grpc.pb.h"
#include "proto/process/port_watch.h"
#include "proto/wire/channel.h"
#include "tests/integration/child_process.h"
#include "tests/integration/metrics_page.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::prefill::v1::PrefillEvent;
using ::prefill::v1::PrefillRequest;
using ::prefill::v1::PrefillService;
using ::testing::Contains;
using ::testing::HasSubstr;

class Operation : public ::testing::Test {
 protected:
  std::vector<std::string> ModelFlags(std::vector<std::string> more = {}) const {
    more.insert(more.begin(), {"--model=" + checkpoint_.dir(), "--device=cpu", "--cpu_threads=1"});
    return more;
  }

  static std::shared_ptr<grpc::Channel> Connect(const std::string& address) {
    return *wire::OpenChannel({.address = address});
  }

  // Sends a request and returns how it ended.
  static grpc::Status Prefill(PrefillService::Stub& stub, const PrefillRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const auto reader = stub.Prefill(&context, request);
    PrefillEvent event;
    while (reader->Read(&event)) {
    }
    return reader->Finish();
  }

  // Returns the lines of a process's log so far.
  static std::vector<std::string> Lines(const ChildProcess& process) {
    return absl::StrSplit(process.stderr_text(), '\n', absl::SkipEmpty());
  }

  static bool Logs(const ChildProcess& process, const std::string& text) {
    return process.AwaitStderr(text, absl::Seconds(30));
  }

  // Makes one grpc.health.v1.Health/Check and returns the status of the service: 1 serving, 2 not
  // serving, or -1 when it is unknown.
  static int HealthOf(const std::string& address, const std::string& service) {
    grpc::GenericStub stub(Connect(address));
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const grpc::Slice slice(absl::StrCat("\n", std::string(1, service.size()), service));
    const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check",
                                            grpc::ByteBuffer(&slice, 1), &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    void* tag = nullptr;
    bool ok = false;
    call->Finish(&response, &status, &queue);
    queue.Next(&tag, &ok);
    grpc::Slice bytes;
    if (!status.ok() || !response.DumpToSingleSlice(&bytes).ok()) return -1;
    return bytes.size() == 2 ? bytes.begin()[1] : -1;
  }

  const model::RandomCheckpoint checkpoint_;
};

// The log is a pipe that holds 64 kB and that nobody reads.
TEST_F(Operation, ALogThatNobodyReadsStopsNeitherRequestsNorTheEnd) {
  int ends[2];
  ASSERT_EQ(pipe2(ends, O_CLOEXEC), 0);
  ServerProcess server("prefilld", ModelFlags(), ends[1]);
  const auto stub = PrefillService::NewStub(Connect(server.address()));
  PrefillRequest refused;
  refused.set_request_id(std::string(1000, '\n'));
  for (int i = 0; i < 3000; ++i) {
    ASSERT_EQ(Prefill(*stub, refused).error_code(), grpc::StatusCode::INVALID_ARGUMENT) << i;
  }
  PrefillRequest good;
  good.add_token_ids(1);
  EXPECT_TRUE(Prefill(*stub, good).ok());
  EXPECT_GT(MetricsPage(server.metrics_address()).Value("prefilld_log_lines_dropped_total"), 100);
  server.Signal(SIGTERM);
  EXPECT_EQ(server.Wait(absl::Seconds(20)), 0);
  close(ends[0]);
  close(ends[1]);
}

// With GRPC_VERBOSITY gRPC itself has a lot to say.
TEST_F(Operation, EveryLineOfAJsonLogIsAnObjectOfPrintableAscii) {
  setenv("GRPC_VERBOSITY", "DEBUG", 1);
  ServerProcess prefilld("prefilld", ModelFlags({"--log_format=json"}));
  ServerProcess worker(
      "prefilld-decode-worker",
      ModelFlags({"--log_format=json", "--prefill_address=" + prefilld.address()}));
  unsetenv("GRPC_VERBOSITY");
  const auto stub = PrefillService::NewStub(Connect(prefilld.address()));
  PrefillRequest hostile;
  hostile.add_token_ids(1);
  hostile.set_request_id("\x1b[2J\xc2\x9b\xe2\x80\xa8\xe2\x80\xae{\"event\":\"ready\"}");
  EXPECT_EQ(Prefill(*stub, hostile).error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  for (ServerProcess* process : {&prefilld, &worker}) {
    process->Signal(SIGTERM);
    EXPECT_EQ(process->Wait(absl::Seconds(20)), 0);
    std::vector<std::string> events;
    for (const std::string& line : Lines(*process)) {
      EXPECT_LT(line.size(), 4096);
      for (const char c : line) EXPECT_TRUE(c >= 0x20 && c < 0x7f) << line;
      const auto object = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
      ASSERT_TRUE(object.is_object()) << line;
      events.push_back(object["event"]);
    }
    EXPECT_THAT(events, Contains("grpc"));
    EXPECT_THAT(events, Contains("ended"));
  }
  EXPECT_THAT(prefilld.stderr_text(), HasSubstr("\\u001b[2J\\u009b\\u2028\\u202e"));
}

TEST_F(Operation, AWorkerThatDoesNotStartSaysSoInItsLog) {
  ChildProcess worker("prefilld-decode-worker", {"--model=/no/such", "--log_format=json",
                                                 "--listen=127.0.0.1:0", "--device=cpu"});
  EXPECT_NE(worker.Wait(absl::Seconds(20)).value_or(0), 0);
  const auto last = nlohmann::json::parse(Lines(worker).back(), nullptr, false);
  ASSERT_TRUE(last.is_object()) << worker.stderr_text();
  EXPECT_EQ(last["event"], "start_failed");
  EXPECT_THAT(std::string(last["status"]), HasSubstr("/no/such"));
}

TEST_F(Operation, AHangupEndsNeitherProgram) {
  ServerProcess prefilld("prefilld", ModelFlags());
  ServerProcess worker("prefilld-decode-worker",
                       ModelFlags({"--prefill_address=" + prefilld.address()}));
  for (ServerProcess* process : {&prefilld, &worker}) {
    process->Signal(SIGHUP);
    EXPECT_TRUE(Logs(*process, "nothing_to_reload")) << process->stderr_text();
    process->Signal(SIGTERM);
    EXPECT_EQ(process->Wait(absl::Seconds(20)), 0);
  }
}

TEST_F(Operation, HealthIsTheSameUnderEveryName) {
  ServerProcess prefilld("prefilld", ModelFlags());
  ServerProcess worker("prefilld-decode-worker",
                       ModelFlags({"--prefill_address=" + prefilld.address()}));
  for (const char* service : {"", "liveness", "prefill.v1.PrefillService"}) {
    EXPECT_EQ(HealthOf(prefilld.address(), service), 1) << service;
  }
  for (const char* service :
       {"", "liveness", "prefill.v1.DecodeService", "prefill.v1.KvReceiver"}) {
    EXPECT_EQ(HealthOf(worker.address(), service), 1) << service;
  }
  EXPECT_EQ(HealthOf(worker.address(), "prefill.v1.NoSuchService"), -1);
}

TEST_F(Operation, OfAPushToANameTheLogShowsTheAddresses) {
  ServerProcess prefilld("prefilld", ModelFlags({"--deliver_to_allow=localhost:*"}));
  const auto stub = PrefillService::NewStub(Connect(prefilld.address()));
  PrefillRequest request;
  request.set_request_id("pushed");
  request.add_token_ids(1);
  request.mutable_deliver_to()->set_address("localhost:1");
  request.mutable_deliver_to()->set_transfer_id("t");
  EXPECT_EQ(Prefill(*stub, request).error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_TRUE(Logs(prefilld, "receiver_addresses id=pushed deliver_to=localhost:1 addresses="));
  EXPECT_TRUE(Logs(prefilld, "127.0.0.1") || Logs(prefilld, "::1"));
}

// All three programs meet at sockets, with nothing but those to listen at or to dial.
TEST_F(Operation, UnixSocketsCarryEverything) {
  const std::string folder = ::testing::TempDir();
  const std::string prefill_socket = absl::StrCat("unix:", folder, "prefill-", getpid());
  const std::string decode_socket = absl::StrCat("unix:", folder, "decode-", getpid());
  const ServerProcess prefilld("prefilld", ModelFlags({"--listen=" + prefill_socket}));
  const ServerProcess worker(
      "prefilld-decode-worker",
      ModelFlags({"--listen=" + decode_socket, "--prefill_address=" + prefill_socket, "--lanes=2",
                  "--kv_pool_tokens=1024"}));
  ChildProcess cli("prefill-cli", {"generate", "--worker=" + decode_socket, "--token_ids=1,2,3",
                                   "--max_new_tokens=2", "--ignore_eos"});
  EXPECT_EQ(cli.Wait(absl::Seconds(30)), 0) << cli.stderr_text();
  ChildProcess info("prefill-cli", {"info", "--server=" + prefill_socket});
  EXPECT_EQ(info.Wait(absl::Seconds(30)), 0) << info.stderr_text();
}

// The folder on the command line is that of another model than the one that is served.
TEST_F(Operation, TextForAnotherModelThanTheServedOneIsRefused) {
  const ServerProcess prefilld("prefilld", ModelFlags());
  const ServerProcess worker("prefilld-decode-worker",
                             ModelFlags({"--prefill_address=" + prefilld.address()}));
  const std::string text = "--text=Once upon a time";
  const std::string model = "--model=model/tiny";
  ChildProcess prefill("prefill-cli", {"prefill", "--server=" + prefilld.address(), model, text});
  EXPECT_EQ(prefill.Wait(absl::Seconds(30)), 1);
  EXPECT_THAT(prefill.stderr_text(), HasSubstr("is not the model that is served"));
  ChildProcess generate("prefill-cli", {"generate", "--worker=" + worker.address(), model, text});
  EXPECT_EQ(generate.Wait(absl::Seconds(30)), 1);
  EXPECT_THAT(generate.stderr_text(), HasSubstr("is not the model that is served"));
  EXPECT_EQ(generate.stdout_text(), "");
}

// Nothing listens at port 9.
TEST_F(Operation, TheCommandLineTakesSeveralAddresses) {
  const ServerProcess prefilld("prefilld", ModelFlags());
  const ServerProcess worker("prefilld-decode-worker",
                             ModelFlags({"--prefill_address=" + prefilld.address()}));
  const std::vector<std::vector<std::string>> commands = {
      {"info", "--server=127.0.0.1:9," + prefilld.address()},
      {"prefill", "--token_ids=1,2", "--server=127.0.0.1:9," + prefilld.address()},
      {"generate", "--token_ids=1,2", "--max_new_tokens=1", "--ignore_eos",
       "--worker=127.0.0.1:9," + worker.address()}};
  for (const std::vector<std::string>& command : commands) {
    ChildProcess cli("prefill-cli", command);
    EXPECT_EQ(cli.Wait(absl::Seconds(30)), 0) << command[0] << ": " << cli.stderr_text();
  }
}

// Prometheus may live in another network than the callers.
TEST_F(Operation, MetricsAreServedAtAnAddressOfTheirOwn) {
  const ServerProcess prefilld("prefilld", ModelFlags({"--metrics_listen=127.0.0.2:0"}));
  const std::string port = prefilld.metrics_address().substr(prefilld.metrics_address().rfind(':'));
  // The watchdog brings gauges up to date a little later.
  EXPECT_TRUE(WaitForMetrics("127.0.0.2" + port, absl::Seconds(10), [](const MetricsPage& page) {
    return page.Value("prefilld_ready") == 1;
  }));
  EXPECT_FALSE(process::Answers("127.0.0.1" + port, absl::Seconds(1)));
}

TEST_F(Operation, ProxyVariablesAreOnlyForThoseWhoWantThem) {
  const ServerProcess prefilld("prefilld", ModelFlags());
  setenv("http_proxy", "http://127.0.0.1:9", 1);  // nothing listens there
  ServerProcess worker("prefilld-decode-worker",
                       ModelFlags({"--prefill_address=" + prefilld.address()}));
  const auto exit_code = [](const std::vector<std::string>& args) {
    ChildProcess cli("prefill-cli", args);
    return cli.Wait(absl::Seconds(30));
  };
  EXPECT_EQ(exit_code({"info", "--server=" + prefilld.address()}), 0);
  EXPECT_EQ(exit_code({"info", "--server=" + prefilld.address(), "--use_proxy"}), 3);
  EXPECT_EQ(exit_code({"generate", "--worker=" + worker.address(), "--token_ids=1,2",
                       "--max_new_tokens=1", "--ignore_eos"}),
            0);
  unsetenv("http_proxy");
}

}  // namespace
}  // namespace prefilld::integration
