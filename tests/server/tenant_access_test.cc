// Tests what the requests of a tenant may ask for, and that the tenants' file holds from the moment
// that it has changed.
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <memory>
#include <vector>

#include <gmock/gmock.h>

#include "absl/strings/str_cat.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using ::testing::MatchesRegex;

class TenantAccess : public ServerFixture {
 protected:
  TenantAccess() {
    folder_ = (std::filesystem::temp_directory_path() / "prefilld-access-XXXXXX").string();
    if (mkdtemp(folder_.data()) == nullptr) abort();
    options_.tenants_file = folder_ + "/tenants.json";
    options_.tenant_evidence.source = TenantSource::kMetadata;
    options_.deliver_to_allow = {"10.2.*.*:7000", "10.3.*.*:7000"};
    options_.max_lanes = 8;
  }
  ~TenantAccess() override {
    StopServer();
    std::filesystem::remove_all(folder_);
  }

  void Write(const std::string& json) const { std::ofstream(options_.tenants_file) << json; }
  void Start(const std::string& json) {
    Write(json);
    const auto tenants =
        Tenants::Read(options_.tenants_file, StrangersOf(options_.tenant_evidence.source));
    ASSERT_TRUE(tenants.ok()) << tenants.status();
    options_.tenants = *tenants;
    StartServer();
  }
  void Reload() { EXPECT_TRUE(server_->ReloadFiles(absl::Seconds(30))); }
  grpc::Status As(const std::string& tenant, const v1::PrefillRequest& request,
                  const std::vector<std::pair<std::string, std::string>>& more = {}) {
    grpc::ClientContext context;
    context.AddMetadata("x-tenant", tenant);
    for (const auto& [key, value] : more) context.AddMetadata(key, value);
    const auto call = stub_->Prefill(&context, request);
    v1::PrefillEvent event;
    while (call->Read(&event)) {
    }
    const grpc::Status status = call->Finish();
    const auto& answer = context.GetServerTrailingMetadata();
    const auto named = answer.find("traceresponse");
    trace_response_ =
        named == answer.end() ? "" : std::string(named->second.data(), named->second.size());
    return status;
  }
  static v1::PrefillRequest PushTo(const std::string& address) {
    v1::PrefillRequest request = PromptOf(10);
    request.mutable_deliver_to()->set_address(address);
    request.mutable_deliver_to()->set_transfer_id("t");
    return request;
  }
  double Refusals(const std::string& cause) const {
    return Metric("prefilld_refusals_total{cause=\"" + cause + "\"}");
  }

  std::string folder_;
  std::string trace_response_;  // of the latest call
};

TEST_F(TenantAccess, ARequestForMoreThanItsTenantMayHaveIsRefusedByCause) {
  Start(R"({"tenants": [
      {"name": "narrow", "policies": ["dense"], "max_lanes": 2, "deliver_to": ["10.2.*.*:7000"]},
      {"name": "pull", "pushes": false}, {"name": "free"}]})");
  v1::PrefillRequest dense = PromptOf(10);
  dense.mutable_attention()->set_policy(v1::ATTENTION_POLICY_DENSE);
  EXPECT_TRUE(As("narrow", dense).ok());

  v1::PrefillRequest shared = PromptOf(10);
  shared.mutable_attention()->set_policy(v1::ATTENTION_POLICY_SHARE);
  EXPECT_TRUE(As("free", shared).ok());
  grpc::Status status = As("narrow", shared);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(status.error_message(),
            "attention.policy share; tenant narrow may ask for dense (policies)");
  EXPECT_EQ(status.error_details(), "") << "the cause stays in the server";
  EXPECT_EQ(Refusals("tenant_policy"), 1);

  v1::PrefillRequest lanes = dense;
  lanes.set_num_lanes(3);
  EXPECT_EQ(As("narrow", lanes).error_message(),
            "num_lanes 3; tenant narrow may use at most 2 (max_lanes)");
  EXPECT_EQ(Refusals("tenant_lanes"), 1);

  EXPECT_EQ(As("pull", PushTo("10.2.0.1:7000")).error_message(),
            "deliver_to.address 10.2.0.1:7000; nothing is pushed for tenant pull (pushes)");
  EXPECT_EQ(Refusals("tenant_pushes"), 1);

  v1::PrefillRequest push = PushTo("10.3.0.1:7000");
  push.mutable_attention()->set_policy(v1::ATTENTION_POLICY_DENSE);
  status = As("narrow", push);
  EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(status.error_message(),
            "deliver_to.address 10.3.0.1:7000; none of the 1 patterns of tenant narrow admits it "
            "(deliver_to)");
  EXPECT_EQ(Refusals("tenant_push_target"), 1);
  EXPECT_EQ(Metric("prefilld_tenant_refused_total{tenant=\"narrow\"}"), 3);

  EXPECT_THAT(As("narrow", PushTo("10.4.0.1:7000")).error_message(),
              HasSubstr("is not on this server's allow-list"));
  EXPECT_EQ(Refusals("push_target"), 1);
  EXPECT_EQ(engine_->started(), 2);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(TenantAccess, EachOfSeveralPushesIsChecked) {
  Start(R"({"tenants": [{"name": "narrow", "deliver_to": ["10.2.*.*:7000"]}]})");
  v1::PrefillRequest request = PromptOf(10);
  for (const char* address : {"10.2.0.1:7000", "10.3.0.1:7000"}) {
    v1::DeliverTo& target = *request.add_pushes()->mutable_deliver_to();
    target.set_address(address);
    target.set_transfer_id("t");
  }
  EXPECT_THAT(As("narrow", request).error_message(),
              HasSubstr("pushes[1].deliver_to.address 10.3.0.1:7000"));
}

TEST_F(TenantAccess, AFurtherReceiverKeepsTheLimitOfItsOwnTenant) {
  Start(R"({"tenants": [{"name": "narrow", "max_lanes": 1}]})");
  v1::AttachReceiverRequest request;
  request.set_request_id("a");
  request.set_receiver_key(std::string(32, 'k'));
  request.set_receiver(1);
  request.set_num_tokens(10);
  request.set_num_lanes(2);
  grpc::ClientContext context;
  context.AddMetadata("x-tenant", "narrow");
  const auto call = stub_->AttachReceiver(&context, request);
  const grpc::Status status = call->Finish();
  EXPECT_EQ(status.error_message(), "num_lanes 2; tenant narrow may use at most 1 (max_lanes)");
  EXPECT_EQ(Refusals("tenant_lanes"), 1);
}

// So many of one tenant would be too many.
TEST_F(TenantAccess, FurtherReceiversThatAreAwayCountForTheirOwnTenants) {
  Start(R"({"tenants": [{"name": "a"}, {"name": "b"}, {"name": "c"}]})");
  engine_->HoldAfter(0);
  constexpr int kRequests = 3, kReceivers = 15;
  const std::string key(32, 'k');
  std::vector<std::unique_ptr<ReadCall>> calls;
  for (int i = 0; i < kRequests; ++i) {
    v1::PrefillRequest request = PromptOf(10, absl::StrCat("r", i));
    request.set_num_receivers(1 + kReceivers);
    request.set_receiver_key(key);
    calls.push_back(std::make_unique<ReadCall>(NewStub(), request));
  }
  for (int i = 0; i < kRequests * kReceivers; ++i) {
    v1::AttachReceiverRequest request;
    request.set_request_id(absl::StrCat("r", i / kReceivers));
    request.set_receiver_key(key);
    request.set_receiver(static_cast<uint32_t>(1 + i % kReceivers));
    request.set_num_tokens(10);
    request.set_resume_key(key);
    grpc::ClientContext context;
    context.AddMetadata("x-tenant", i % 2 == 0 ? "b" : "c");
    const auto call = stub_->AttachReceiver(&context, request);
    v1::PrefillEvent event;
    ASSERT_TRUE(call->Read(&event));
    EXPECT_TRUE(event.has_accepted());
    context.TryCancel();
  }
  EXPECT_TRUE(Eventually([&] {
    return Metric("prefilld_waiting_for_consumer") + Metric("prefilld_resume_refused_total") ==
           kRequests * kReceivers;
  }));
  EXPECT_EQ(Metric("prefilld_resume_refused_total"), 0);
  for (const auto& call : calls) call->Cancel();
  engine_->HoldAfter(-1);
}

TEST_F(TenantAccess, LimitsOfTheTenantAreCountedByCause) {
  Start(R"({"tenants": [{"name": "slow", "tokens_per_second": 1},
                        {"name": "single", "max_requests": 1}]})");
  EXPECT_TRUE(As("slow", PromptOf(10)).ok());
  EXPECT_EQ(As("slow", PromptOf(10)).error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(Refusals("tenant_rate"), 1);

  engine_->HoldAfter(0);
  grpc::ClientContext context;
  context.AddMetadata("x-tenant", "single");
  const auto held = stub_->Prefill(&context, PromptOf(10));
  v1::PrefillEvent event;
  ASSERT_TRUE(held->Read(&event));
  EXPECT_THAT(As("single", PromptOf(10)).error_message(), HasSubstr("(max_requests)"));
  EXPECT_EQ(Refusals("tenant_requests"), 1);
  engine_->HoldAfter(-1);
  while (held->Read(&event)) {
  }
  EXPECT_TRUE(held->Finish().ok());
}

TEST_F(TenantAccess, ANewFileHoldsAtOnceAndKeepsWhatIsCounted) {
  Start(R"({"unknown": "refuse", "tenants": [{"name": "a"}, {"name": "b", "weight": 2}]})");
  EXPECT_TRUE(As("b", PromptOf(10)).ok());
  EXPECT_EQ(As("c", PromptOf(10)).error_code(), grpc::StatusCode::UNAUTHENTICATED);

  // A request that is under way goes on, though its tenant is gone.
  engine_->HoldAfter(1);
  grpc::ClientContext context;
  context.AddMetadata("x-tenant", "a");
  const auto held = stub_->Prefill(&context, PromptOf(10));
  v1::PrefillEvent event;
  ASSERT_TRUE(held->Read(&event));
  Write(R"({"unknown": "refuse", "tenants": [{"name": "c"}, {"name": "b", "max_lanes": 1}]})");
  Reload();
  EXPECT_EQ(As("a", PromptOf(10)).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  engine_->HoldAfter(-1);
  while (held->Read(&event)) {
  }
  EXPECT_TRUE(held->Finish().ok());

  EXPECT_TRUE(As("c", PromptOf(10)).ok());
  EXPECT_TRUE(As("b", PromptOf(10)).ok());
  v1::PrefillRequest lanes = PromptOf(10);
  lanes.set_num_lanes(2);
  EXPECT_THAT(As("b", lanes).error_message(), HasSubstr("(max_lanes)"));
  // A caller may have the end of its call before the server has counted it.
  for (const auto& [tenant, requests] : {std::pair("a", 1), {"b", 2}, {"c", 1}}) {
    const std::string series =
        absl::StrCat("prefilld_tenant_requests_total{tenant=\"", tenant, "\"}");
    EXPECT_TRUE(Eventually([&, requests = requests] { return Metric(series) == requests; }))
        << series;
  }
  EXPECT_EQ(Metric("prefilld_tenants"), 2);
  EXPECT_EQ(Metric("prefilld_tenants_reloads_total{result=\"ok\"}"), 1);
}

// A call that follows the prefix cache may last for weeks, so its caller is looked at again.
TEST_F(TenantAccess, WhoFollowsTheCacheIsEndedWhenItsTenantIsGoneOrRenamed) {
  engine_options_.prefix_slots = 4;
  options_.cache_watch.watchers = {"router", "other"};
  Start(R"({"unknown": "refuse", "tenants": [{"name": "router"}, {"name": "other"}]})");
  struct Following {
    Following(v1::PrefillService::Stub& stub, const std::string& tenant) {
      context.AddMetadata("x-tenant", tenant);
      reader = stub.WatchPrefixCache(&context, {});
      v1::PrefixCacheUpdate update;
      EXPECT_TRUE(reader->Read(&update)) << "it follows";
    }
    ~Following() { context.TryCancel(); }
    grpc::ClientContext context;
    std::unique_ptr<grpc::ClientReader<v1::PrefixCacheUpdate>> reader;
  };
  const auto end_of = [](Following& following) {
    v1::PrefixCacheUpdate update;
    while (following.reader->Read(&update)) {
    }
    return following.reader->Finish();
  };
  Following router(*stub_, "router"), other(*stub_, "other");
  Write(R"({"unknown": "refuse", "tenants": [{"name": "routers"}, {"name": "other"}]})");
  Reload();
  const grpc::Status gone = end_of(router);
  EXPECT_EQ(gone.error_code(), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_THAT(gone.error_message(), HasSubstr("the tenants have changed: no tenant has the name"));
  EXPECT_EQ(Metric("prefilld_prefix_cache_watchers_revoked_total"), 1);
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_prefix_cache_watchers") == 1; }))
      << "the other one follows on";

  // Strangers are a tenant again, but not one that may follow.
  Write(R"({"tenants": [{"name": "routers"}]})");
  Reload();
  EXPECT_EQ(end_of(other).error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(Metric("prefilld_prefix_cache_watchers_revoked_total"), 2);
  EXPECT_EQ(Refusals("forbidden"), 0) << "no call was refused";
}

TEST_F(TenantAccess, WhatTheServerRunsIsNoSecret) {
  Start(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  grpc::ClientContext context;
  v1::ServerInfo info;
  EXPECT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
  EXPECT_FALSE(info.model_fingerprint().empty());
}

TEST_F(TenantAccess, ABrokenFileIsRefusedAndTheOldOneStays) {
  Start(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  for (const char* broken : {"{", R"({"tenants": [{"name": "b", "wieght": 1}]})",
                             R"({"tenants": [{"name": "b", "policies": ["baseline_random"]}]})"}) {
    Write(broken);
    Reload();
    EXPECT_TRUE(As("a", PromptOf(10)).ok());
    EXPECT_EQ(As("b", PromptOf(10)).error_code(), grpc::StatusCode::UNAUTHENTICATED);
    EXPECT_EQ(Metric("prefilld_tenants_refused"), 1);
  }
  std::filesystem::remove(options_.tenants_file);
  Reload();
  EXPECT_TRUE(As("a", PromptOf(10)).ok());
  EXPECT_EQ(Metric("prefilld_tenants_reloads_total{result=\"refused\"}"), 4);
  EXPECT_EQ(Metric("prefilld_tenants_reloads_total{result=\"ok\"}"), 0);
  EXPECT_EQ(Metric("prefilld_tenants_refused"), 1);
  Write(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  Reload();
  EXPECT_EQ(Metric("prefilld_tenants_refused"), 0);
}

// One of them may be a caller's own beside that of the gateway, in whatever order.
TEST_F(TenantAccess, ANameThatComesTwiceIsNone) {
  Start(R"({"unknown": "refuse", "tenants": [{"name": "a"}, {"name": "b"}]})");
  EXPECT_EQ(As("a", PromptOf(10)).error_code(), grpc::StatusCode::OK);
  for (const char* own : {"a", "b", "stranger", ""}) {
    EXPECT_EQ(As("a", PromptOf(10), {{"x-tenant", own}}).error_code(),
              grpc::StatusCode::UNAUTHENTICATED)
        << own;
  }
}

// The file says nothing about strangers.
TEST_F(TenantAccess, WithoutATokenNobodyGetsInAndTheLastOneCanBeRevoked) {
  const auto file_with = [](const std::string& tokens) {
    return absl::StrCat(R"({"tenants": [{"name": "a", "token_sha256": [)", tokens,
                        R"(]}, {"name": "default"}]})");
  };
  const auto with = [this](const std::string& value) {
    return As("a", PromptOf(10), {{"authorization", value}}).error_code();
  };
  options_.tenant_evidence.source = TenantSource::kToken;
  Start(file_with(R"("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad")"));
  EXPECT_EQ(with("Bearer abc"), grpc::StatusCode::OK);
  EXPECT_EQ(As("a", PromptOf(10)).error_code(), grpc::StatusCode::UNAUTHENTICATED);
  for (const char* wrong : {"Bearer abd", "Bearer ", "Bearer", "Basic abc", "abc", ""}) {
    EXPECT_EQ(with(wrong), grpc::StatusCode::UNAUTHENTICATED) << wrong;
  }
  EXPECT_EQ(Refusals("unauthenticated"), 7);

  // The hash of no text would let everybody in who shows no token.
  Write(file_with(R"("e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")"));
  Reload();
  EXPECT_EQ(Metric("prefilld_tenants_refused"), 1);
  EXPECT_EQ(with("Bearer abc"), grpc::StatusCode::OK) << "the old file holds";
  EXPECT_EQ(with("Bearer "), grpc::StatusCode::UNAUTHENTICATED);

  Write(file_with(""));
  Reload();
  EXPECT_EQ(Metric("prefilld_tenants_refused"), 0);
  EXPECT_EQ(with("Bearer abc"), grpc::StatusCode::UNAUTHENTICATED);
  EXPECT_EQ(As("a", PromptOf(10)).error_code(), grpc::StatusCode::UNAUTHENTICATED);

  Write(R"({"unknown": "default", "tenants": [{"name": "a"}]})");
  Reload();
  EXPECT_EQ(with("Bearer abd"), grpc::StatusCode::OK) << "the operator wants that";
  EXPECT_EQ(As("a", PromptOf(10)).error_code(), grpc::StatusCode::OK);
}

TEST_F(TenantAccess, TenantsComeAndGoWhileAllCompute) {
  Start(R"({"tenants": [{"name": "t0"}]})");
  std::atomic<bool> stop = false;
  std::atomic<int> failed = 0;
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&, i] {
      const auto stub = NewStub();
      for (int turn = 0; !stop; ++turn) {
        grpc::ClientContext context;
        context.AddMetadata("x-tenant", absl::StrCat("t", (turn + i) % 20));
        const auto call = stub->Prefill(&context, PromptOf(10));
        v1::PrefillEvent event;
        while (call->Read(&event)) {
        }
        failed += call->Finish().ok() ? 0 : 1;
      }
    });
  }
  for (int version = 0; version < 40; ++version) {
    Write(absl::StrCat(R"({"tenants": [{"name": "t)", version % 20, R"(", "weight": )", version + 1,
                       R"(}, {"name": "t)", (version + 7) % 20, R"("}]})"));
    Reload();
    absl::SleepFor(absl::Milliseconds(10));
  }
  stop = true;
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(failed, 0);
  EXPECT_GE(Metric("prefilld_tenants_reloads_total{result=\"ok\"}"), 40);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(TenantAccess, AChangeIsSeenWithoutAWord) {
  Start(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  Write(R"({"unknown": "refuse", "tenants": [{"name": "a"}, {"name": "b"}]})");
  EXPECT_TRUE(Eventually([this] { return As("b", PromptOf(10)).ok(); }));
}

TEST_F(TenantAccess, AnswersNameTheSpanOfTheirRequest) {
  Start(R"({"unknown": "refuse", "tenants": [{"name": "a"}]})");
  const std::string trace = "4bf92f3577b34da6a3ce929d0e0e4736";
  const std::string parent = "00-" + trace + "-00f067aa0ba902b7-01";
  EXPECT_TRUE(As("a", PromptOf(10), {{"traceparent", parent}}).ok());
  EXPECT_THAT(trace_response_, MatchesRegex("00-" + trace + "-[0-9a-f]{16}-01"));
  EXPECT_NE(trace_response_, parent);

  EXPECT_FALSE(As("stranger", PromptOf(10), {{"traceparent", parent}}).ok());
  EXPECT_THAT(trace_response_, MatchesRegex("00-" + trace + "-[0-9a-f]{16}-01")) << "a refusal too";
  EXPECT_EQ(Metric("prefilld_trace_contexts_ignored_total"), 0);

  EXPECT_TRUE(As("a", PromptOf(10), {{"traceparent", "00-" + std::string(4000, 'f')}}).ok());
  EXPECT_THAT(trace_response_, MatchesRegex("00-[0-9a-f]{32}-[0-9a-f]{16}-00"));
  EXPECT_EQ(Metric("prefilld_trace_contexts_ignored_total"), 1);
}

}  // namespace
}  // namespace prefilld::server
