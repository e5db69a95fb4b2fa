// Tests `prefill-cli bench-kv` with a prefilld that makes its KV up, each a process of its own.
#include <string>
#include <vector>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "nlohmann/json.hpp"
#include "tests/integration/child_process.h"
#include "tests/model/random_checkpoint.h"

namespace prefilld::integration {
namespace {

using ::nlohmann::json;
using ::testing::HasSubstr;

TEST(KvBench, TellsWhatEachNumberOfLanesBringsAndCostsBesideBareTcp) {
  ServerProcess server("prefilld", {"--kv_bench_listen=127.0.0.1:0", "--staging_bytes=16777216",
                                    "--shared_memory_bytes=268435456"});
  ChildProcess cli("prefill-cli", {"bench-kv", "--server=" + server.address(),
                                   "--peer=" + server.kv_bench_address(), "--lanes=1,3",
                                   "--transfer_mb=40", "--runs=3", "--json"});
  ASSERT_EQ(cli.Wait(absl::Seconds(40)), 0) << cli.stderr_text() << server.stderr_text();
  const json report = json::parse(cli.stdout_text());
  const int64_t bytes = report["transfer_bytes"].get<int64_t>();
  EXPECT_LE(bytes, 40'000'000);
  EXPECT_GT(bytes, 40'000'000 - 3 * 1024 * 1024) << "a block of all layers has 2 MiB";
  ASSERT_EQ(report["lanes"].size(), 4u);
  for (const json& row : report["lanes"]) {
    for (const char* way : {"kv", "tcp"}) {
      EXPECT_EQ(row[way]["gb_per_s_of_runs"].size(), 3u);
      EXPECT_GT(row[way]["gb_per_s"], 0.0);
      // Nobody moves a gigabyte in a hundredth of a second of one core.
      EXPECT_GT(row[way]["cpu_s_per_gb_here"], 0.01);
      EXPECT_GT(row[way]["cpu_s_per_gb_there"], 0.01);
    }
  }
  const auto name = [&report](int i) {
    const json& row = report["lanes"][i];
    return row["transport"].get<std::string>() + " " + std::to_string(row["lanes"].get<int>());
  };
  EXPECT_EQ(name(0), "grpc 1");
  EXPECT_EQ(name(1), "grpc 3");
  EXPECT_EQ(name(2), "shared 1");
  EXPECT_EQ(name(3), "shared 3");
  EXPECT_THAT(server.stderr_text(), HasSubstr("lanes=3")) << "the log tells each request";
}

TEST(KvBench, AServerWithAModelIsNotMeasured) {
  const model::RandomCheckpoint checkpoint;
  ServerProcess server("prefilld", {"--model=" + checkpoint.dir(), "--device=cpu"});
  ChildProcess cli("prefill-cli", {"bench-kv", "--server=" + server.address(),
                                   "--peer=" + server.metrics_address()});
  EXPECT_EQ(cli.Wait(absl::Seconds(40)), 1);
  EXPECT_THAT(cli.stderr_text(), HasSubstr("bench-kv measures prefilld --kv_bench_listen"));
}

}  // namespace
}  // namespace prefilld::integration
