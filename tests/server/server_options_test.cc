#include "server/server_options.h"

#include <limits>

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

ServerOptions ValidOptions() {
  ServerOptions options;
  options.engine.checkpoint_dir = "/models/one";
  return options;
}

TEST(ServerOptions, DefaultsAreValidWithAModel) {
  EXPECT_EQ(Validate(ValidOptions()), absl::OkStatus());
}

TEST(ServerOptions, EveryProblemIsListedWithItsFlagValueAndLimit) {
  ServerOptions options;
  options.listen = "nowhere";
  options.metrics_listen = "host:99999";
  options.tls.cert_file = "/does/not/exist.pem";
  options.engine.max_batch_tokens = 1 << 20;
  options.engine.max_resident_tokens = -5;
  options.engine.max_graph_tokens = -1;
  options.queue_capacity = -1;
  options.max_lanes = 17;
  options.frame_bytes = 1000;
  options.stall_timeout = absl::Seconds(0);
  options.min_consumer_mb_per_s = -1;
  options.attention.gamma = 1.5f;
  options.recall_audit = {.fraction = 1.5, .rows = -1};
  options.deliver_to_allow = {"everyone"};
  const absl::Status status = Validate(options);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  for (const char* part :
       {"--model is required", "--listen=nowhere", "--metrics_listen=host:99999",
        "--tls_cert and --tls_key belong together", "--tls_cert=/does/not/exist.pem",
        "--max_batch_tokens=1048576 is outside 0 to 524288",
        "--max_resident_tokens=-5 is outside 0 to 268435456",
        "--max_graph_tokens=-1 is outside 0 to 4096", "--queue_capacity=-1 is outside 0 to",
        "--max_lanes=17 is outside 1 to 16", "--frame_bytes=1000 is outside 1048576 to 4194304",
        "--stall_timeout_s=0", "--min_consumer_mb_per_s=-1", "gamma 1.5",
        "--recall_audit_fraction=1.5 is outside [0, 1]", "--recall_audit_rows=-1 is outside 0 to",
        "--deliver_to_allow: 'everyone'"}) {
    EXPECT_THAT(std::string(status.message()), HasSubstr(part));
  }
}

TEST(ServerOptions, MadeUpKvComesWithoutAModel) {
  ServerOptions options;
  options.kv_bench_listen = "0.0.0.0:50053";
  EXPECT_EQ(Validate(options), absl::OkStatus());
  options.engine.checkpoint_dir = "/models/one";
  EXPECT_THAT(Validate(options).message(),
              HasSubstr("--model and --kv_bench_listen exclude each other"));
  options = ServerOptions();
  EXPECT_THAT(Validate(options).message(), HasSubstr("--model is required"));
  options.kv_bench_listen = "somewhere";
  EXPECT_THAT(Validate(options).message(), HasSubstr("--kv_bench_listen=somewhere"));
}

TEST(ServerOptions, PackingThreadsFollowCores) {
  ServerOptions options;
  EXPECT_EQ(PackThreads(options, 1), 1);
  EXPECT_EQ(PackThreads(options, 2), 1);
  EXPECT_EQ(PackThreads(options, 6), 3);
  EXPECT_EQ(PackThreads(options, 16), 8);
  EXPECT_EQ(PackThreads(options, 192), 8);
  options.max_lanes = 1;
  EXPECT_EQ(PackThreads(options, 16), 8) << "they serve all requests";
  options.pack_threads = 5;
  EXPECT_EQ(PackThreads(options, 1), 5);
}

TEST(ServerOptions, RefusesTenantsThatNobodyCanTellApart) {
  const auto problems = [](const ServerOptions& options) {
    return std::string(Validate(options).message());
  };
  ServerOptions options = ValidOptions();
  options.tenant_evidence.source = TenantSource::kMetadata;
  EXPECT_THAT(problems(options), HasSubstr("--tenant_from=metadata needs --tenants"));
  options.tenants_file = "tenants.json";
  options.tenants = *Tenants::Parse(R"({"tenants": [{"name": "a"}]})");
  EXPECT_TRUE(Validate(options).ok()) << Validate(options);
  for (const char* key : {"", "X-Tenant", "x tenant", "tenant-bin", "grpc-tenant"}) {
    options.tenant_evidence.metadata_key = key;
    EXPECT_THAT(problems(options), HasSubstr(std::string("--tenant_metadata_key=") + key));
  }
  options.tenant_evidence.metadata_key = "x-tenant";
  options.tenant_evidence.source = TenantSource::kNone;
  EXPECT_THAT(problems(options), HasSubstr("--tenant_from is needed"));
  options.tenant_evidence.source = TenantSource::kCertificate;
  EXPECT_THAT(problems(options), HasSubstr("--tenant_from=certificate needs --tls_client_ca"));
  options.tenant_evidence.source = TenantSource::kToken;
  EXPECT_THAT(problems(options), HasSubstr("needs a token_sha256 in --tenants"));
  EXPECT_TRUE(CheckTenants(options, options.tenants).ok())
      << "while the server runs, the last token may be revoked";
}

TEST(ServerOptions, WatchersOfTheCacheAreTenantsOrAll) {
  const auto problems = [](const ServerOptions& options) {
    return std::string(Validate(options).message());
  };
  ServerOptions options = ValidOptions();
  options.cache_watch.watchers = {"all"};
  EXPECT_EQ(problems(options), "--cache_watchers needs --prefix_cache_bytes");
  options.engine.prefix_cache_bytes = 1 << 20;
  EXPECT_EQ(problems(options), "");
  options.cache_watch.watchers = {"router"};
  EXPECT_EQ(problems(options),
            "--cache_watchers: 'router' is neither all nor a tenant of --tenants");
  options.tenant_evidence.source = TenantSource::kMetadata;
  options.tenants_file = "tenants.json";
  options.tenants = *Tenants::Parse(R"({"tenants": [{"name": "router"}]})");
  EXPECT_EQ(problems(options), "");
  options.cache_watch = {.watchers = {}, .tokens = true};
  EXPECT_EQ(problems(options), "--cache_watch_tokens needs --cache_watchers");
}

TEST(ServerOptions, RefusesContradictions) {
  ServerOptions options = ValidOptions();
  options.tls.client_ca_file = "/dev/null";
  EXPECT_THAT(std::string(Validate(options).message()), HasSubstr("--tls_client_ca needs"));
  options = ValidOptions();
  options.wedge_timeout = options.stall_timeout;
  EXPECT_THAT(std::string(Validate(options).message()), HasSubstr("--wedge_timeout_s must be"));
  options = ValidOptions();
  options.attention.policy = model::AttentionPolicy::kShare;
  options.allowed_policies = {model::AttentionPolicy::kDense};
  EXPECT_THAT(std::string(Validate(options).message()), HasSubstr("--policy=share"));
  options = ValidOptions();
  options.staging_bytes = options.frame_bytes;
  EXPECT_THAT(std::string(Validate(options).message()), HasSubstr("--staging_bytes"));
  options = ValidOptions();
  options.stall_timeout = absl::Seconds(std::numeric_limits<double>::quiet_NaN());
  EXPECT_FALSE(Validate(options).ok());
}

}  // namespace
}  // namespace prefilld::server
