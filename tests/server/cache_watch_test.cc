// Tests what a server tells those who follow its prefix cache, over an index that the test fills.
#include "server/cache_watch.h"

#include <memory>
#include <set>
#include <string>
#include <vector>

#include <gmock/gmock.h>

#include "model/prefill/prefix_cache.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// One caller that follows.
struct Watcher {
  Watcher(v1::PrefillService::Stub& stub, bool token_ids = false, const std::string& tenant = "") {
    context.set_deadline(absl::ToChronoTime(absl::Now() + absl::Seconds(20)));
    if (!tenant.empty()) context.AddMetadata("x-tenant", tenant);
    v1::WatchPrefixCacheRequest request;
    request.set_token_ids(token_ids);
    reader = stub.WatchPrefixCache(&context, request);
  }
  ~Watcher() { context.TryCancel(); }

  v1::PrefixCacheUpdate Next() {
    v1::PrefixCacheUpdate update;
    EXPECT_TRUE(reader->Read(&update)) << reader->Finish().error_message();
    return update;
  }
  // Returns the status of a stream that has nothing more to say.
  grpc::Status End() {
    v1::PrefixCacheUpdate update;
    while (reader->Read(&update)) {
    }
    return reader->Finish();
  }

  grpc::ClientContext context;
  std::unique_ptr<grpc::ClientReader<v1::PrefixCacheUpdate>> reader;
};

class CacheWatchTest : public ServerFixture {
 protected:
  CacheWatchTest() {
    engine_options_.prefix_slots = 4;
    options_.cache_watch.watchers = {"all"};
  }

  // Has the prompt of these blocks computed by the engine, as it were.
  void Compute(const std::vector<uint32_t>& ids, bool is_private = false) {
    std::vector<uint32_t> tokens;
    for (const uint32_t id : ids) tokens.insert(tokens.end(), model::kPrefixBlockTokens, id);
    model::AttentionOptions attention;
    attention.policy = model::AttentionPolicy::kDense;
    engine_->prefixes().Take({"domain", tokens, attention, is_private}).Publish();
  }
};

TEST_F(CacheWatchTest, ASnapshotComesFirstAndThenTheChanges) {
  StartServer();
  Compute({1, 2});
  Watcher watcher(*stub_);
  v1::PrefixCacheUpdate update = watcher.Next();
  EXPECT_TRUE(update.in_snapshot());
  EXPECT_EQ(update.sequence(), 2);
  EXPECT_EQ(update.model_fingerprint(), engine_->info().fingerprint);
  EXPECT_EQ(update.block_tokens(), 128);
  ASSERT_THAT(update.changes(), SizeIs(2));
  const v1::CachedBlock first = update.changes(0).stored(), second = update.changes(1).stored();
  EXPECT_THAT(first.key(), SizeIs(16));
  EXPECT_EQ(first.parent(), "");
  EXPECT_EQ(second.parent(), first.key());
  EXPECT_EQ(second.policy(), v1::ATTENTION_POLICY_DENSE);
  EXPECT_THAT(second.token_ids(), IsEmpty()) << "nobody asked for them, nor allowed them";
  update = watcher.Next();
  EXPECT_FALSE(update.in_snapshot());
  EXPECT_THAT(update.changes(), IsEmpty());
  EXPECT_EQ(update.model_fingerprint(), "") << "in the first update alone";

  Compute({1, 3, 4, 5});
  update = watcher.Next();
  ASSERT_THAT(update.changes(), SizeIs(4));
  EXPECT_EQ(update.changes(0).removed(), second.key());
  EXPECT_EQ(update.changes(1).stored().parent(), first.key());
  EXPECT_EQ(update.sequence(), 6);
}

TEST_F(CacheWatchTest, TokensComeIfTheyAreAskedForAndAllowedAndNobodysSecret) {
  options_.cache_watch.tokens = true;
  StartServer();
  Compute({7});
  Compute({8}, /*is_private=*/true);
  const v1::PrefixCacheUpdate shown = Watcher(*stub_, /*token_ids=*/true).Next();
  ASSERT_THAT(shown.changes(), SizeIs(2));
  EXPECT_THAT(shown.changes(0).stored().token_ids(), SizeIs(128));
  EXPECT_EQ(shown.changes(0).stored().token_ids(127), 7);
  EXPECT_THAT(shown.changes(1).stored().token_ids(), IsEmpty());
  EXPECT_THAT(Watcher(*stub_).Next().changes(0).stored().token_ids(), IsEmpty());

  StopServer();
  options_.cache_watch.tokens = false;
  StartServer();
  Compute({7});
  EXPECT_THAT(Watcher(*stub_, /*token_ids=*/true).Next().changes(0).stored().token_ids(),
              IsEmpty());
}

TEST_F(CacheWatchTest, NobodyMayFollowUnlessTheOperatorSaysSo) {
  options_.cache_watch.watchers = {};
  StartServer();
  const grpc::Status status = Watcher(*stub_).End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(status.error_message(), "this server lets nobody follow its prefix cache");
}

TEST_F(CacheWatchTest, OnlyTheTenantsThatTheOperatorNamesMayFollow) {
  options_.tenant_evidence.source = TenantSource::kMetadata;
  options_.tenants = *Tenants::Parse(
      R"({"unknown": "refuse", "tenants": [{"name": "router"}, {"name": "search"}]})");
  options_.cache_watch.watchers = {"router"};
  StartServer();
  EXPECT_FALSE(Watcher(*stub_, false, "router").Next().in_snapshot());
  const grpc::Status other = Watcher(*stub_, false, "search").End();
  EXPECT_EQ(other.error_code(), grpc::StatusCode::PERMISSION_DENIED);
  EXPECT_EQ(other.error_message(), "tenant search may not follow the prefix cache");
  EXPECT_EQ(Watcher(*stub_, false, "stranger").End().error_code(),
            grpc::StatusCode::UNAUTHENTICATED);
}

TEST_F(CacheWatchTest, AServerWithoutACacheSaysSo) {
  engine_options_.prefix_slots = 0;
  StartServer();
  const grpc::Status status = Watcher(*stub_).End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(status.error_message(), "this server has no prefix cache");
}

TEST_F(CacheWatchTest, SixteenMayFollowAndOneThatLeavesMakesRoom) {
  StartServer();
  std::vector<std::unique_ptr<Watcher>> watchers;
  for (size_t i = 0; i < CacheWatch::kMaxWatchers; ++i) {
    watchers.push_back(std::make_unique<Watcher>(*stub_));
    watchers.back()->Next();
  }
  EXPECT_EQ(Metric("prefilld_prefix_cache_watchers"), 16);
  const grpc::Status status = Watcher(*stub_).End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(status.error_message(), "16 callers follow the prefix cache; at most 16");
  EXPECT_EQ(Metric("prefilld_refusals_total{cause=\"watchers\"}"), 1);
  watchers.pop_back();
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_prefix_cache_watchers") == 15; }));
  Watcher(*stub_).Next();
}

// The caller reads nothing, and gRPC takes a few messages off the stream before that holds it up.
TEST_F(CacheWatchTest, OneThatReadsTooSlowlyIsEndedAndOthersGoOn) {
  engine_options_.prefix_slots = 2000;
  engine_options_.prefix_events = 2000;
  options_.cache_watch.tokens = true;
  StartServer();
  const auto own_connection = NewStub();
  Watcher quick(*stub_);
  quick.Next();
  Watcher slow(*own_connection, /*token_ids=*/true);
  const auto is_behind = [this] {
    return Metric("prefilld_prefix_cache_watchers_behind_total") == 1;
  };
  uint32_t id = 0;
  EXPECT_TRUE(Eventually([&] {
    for (int i = 0; i < 200; ++i) Compute({++id});
    const bool behind = is_behind();
    while (!behind && quick.Next().sequence() < engine_->prefixes().last_event()) {
    }
    return behind;
  }));
  EXPECT_EQ(Metric("prefilld_prefix_cache_watchers_behind_total"), 1);
  const grpc::Status status = slow.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::ABORTED) << status.error_message();
  EXPECT_THAT(status.error_message(), HasSubstr("start over"));
  while (quick.Next().sequence() < engine_->prefixes().last_event()) {
  }
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_prefix_cache_watchers") == 1; }));
}

TEST_F(CacheWatchTest, ADrainEndsEveryStream) {
  StartServer();
  Watcher watcher(*stub_);
  watcher.Next();
  EXPECT_TRUE(server_->Drain(absl::Seconds(5)));
  const grpc::Status status = watcher.End();
  EXPECT_EQ(status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(status.error_message(), "the server is draining");
  EXPECT_EQ(Watcher(*stub_).End().error_code(), grpc::StatusCode::UNAVAILABLE);
}

}  // namespace
}  // namespace prefilld::server
