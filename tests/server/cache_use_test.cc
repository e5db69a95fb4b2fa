// Tests how requests use the prefix cache of an engine, and what the server tells about it.
#include <string>

#include "gmock/gmock.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::HasSubstr;

class PrefixCacheTest : public ServerFixture {
 protected:
  PrefixCacheTest() { engine_options_.cached_tokens = 512; }

  v1::ServerInfo Info() {
    v1::ServerInfo info;
    grpc::ClientContext context;
    EXPECT_TRUE(stub_->GetServerInfo(&context, {}, &info).ok());
    return info;
  }
};

TEST_F(PrefixCacheTest, ResultSaysHowManyTokensWereCached) {
  StartServer();
  const StreamContents cached = Prefill(PromptOf(600));
  ASSERT_TRUE(cached.status.ok()) << cached.status.error_message();
  EXPECT_EQ(cached.result()->cached_tokens(), 512);
  EXPECT_EQ(cached.result()->num_tokens(), 600);
  ExpectWholeCache(cached.frames(), cached.events.front().accepted().layout(), 512);
  EXPECT_EQ(Prefill(PromptOf(300)).result()->cached_tokens(), 0);
  EXPECT_TRUE(EverythingIsFree());
}

// Returns how many blocks of all layers these frames hold.
int64_t BlocksOf(const std::vector<v1::KvFrame>& frames) {
  int64_t blocks = 0;
  for (const v1::KvFrame& frame : frames) blocks += frame.num_blocks();
  return blocks;
}

TEST_F(PrefixCacheTest, CachedKvOfAllLayersLeavesBeforeALayerIsDone) {
  StartServer();
  engine_->HoldAfter(0);
  grpc::ClientContext context;
  const auto call = stub_->Prefill(&context, PromptOf(600));
  std::vector<v1::KvFrame> frames;
  v1::KvLayout layout;
  v1::PrefillEvent event;
  while (BlocksOf(frames) < 4 * 512 / 16 && call->Read(&event)) {
    if (event.has_accepted()) layout = event.accepted().layout();
    if (event.has_kv_frame()) frames.push_back(event.kv_frame());
  }
  EXPECT_EQ(engine_->layers_run(), 0);
  for (const v1::KvFrame& frame : frames) {
    EXPECT_EQ(frame.layers_computed(), 0);
    EXPECT_LE((frame.first_block() + frame.num_blocks()) * 16, 512);
  }
  engine_->HoldAfter(-1);
  while (call->Read(&event)) {
    if (event.has_kv_frame()) frames.push_back(event.kv_frame());
  }
  EXPECT_TRUE(call->Finish().ok());
  ExpectWholeCache(frames, layout, 512);
  EXPECT_TRUE(EverythingIsFree());
}

TEST_F(PrefixCacheTest, ARequestThatIsCancelledWhileItsCachedKvStreamsLeavesNothing) {
  StartServer();
  engine_->HoldAfter(0);
  grpc::ClientContext context;
  const auto call = stub_->Prefill(&context, PromptOf(600));
  v1::PrefillEvent event;
  while (!event.has_kv_frame() && call->Read(&event)) {
  }
  EXPECT_TRUE(event.has_kv_frame());
  context.TryCancel();
  while (call->Read(&event)) {
  }
  EXPECT_EQ(call->Finish().error_code(), grpc::StatusCode::CANCELLED);
  engine_->HoldAfter(-1);
  EXPECT_TRUE(EverythingIsFree());
}

// The consumer holds the first 512 tokens. If the server has them too, nobody computes them;
// otherwise they are computed and not sent.
TEST_F(PrefixCacheTest, WhatTheConsumerHoldsAndTheServerHasIsNeitherComputedNorPackedNorSent) {
  StartServer();
  v1::PrefillRequest request = PromptOf(600);
  request.mutable_layout()->set_first_block(512 / 16);
  const auto expect_the_rest = [&](int64_t cached_tokens) {
    const StreamContents contents = Prefill(request);
    ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
    EXPECT_EQ(contents.result()->cached_tokens(), cached_tokens);
    EXPECT_EQ(BlocksOf(contents.frames()), 4 * 6);
    ExpectWholeCache(contents.frames(), contents.events.front().accepted().layout());
    EXPECT_EQ(engine_->cached_packs(), 0);
  };
  expect_the_rest(512);
  EXPECT_EQ(Metric("prefilld_step_tokens_total"), 4 * (600 - 512));
  request.mutable_prefix_cache()->set_bypass(true);
  expect_the_rest(0);
  EXPECT_EQ(Metric("prefilld_step_tokens_total"), 4 * (600 - 512) + 4 * 600);
}

// The consumer gets those of the cached blocks that it does not hold.
TEST_F(PrefixCacheTest, CachedKvBeginsBehindWhatTheConsumerHolds) {
  StartServer();
  v1::PrefillRequest request = PromptOf(600);
  request.mutable_layout()->set_first_block(300 / 16);
  const StreamContents contents = Prefill(request);
  ASSERT_TRUE(contents.status.ok()) << contents.status.error_message();
  ExpectWholeCache(contents.frames(), contents.events.front().accepted().layout(), 512);
  EXPECT_GT(engine_->cached_packs(), 0);
}

TEST_F(PrefixCacheTest, ARequestMayBypassItAndHasASalt) {
  StartServer();
  v1::PrefillRequest request = PromptOf(600);
  request.mutable_prefix_cache()->set_bypass(true);
  EXPECT_EQ(Prefill(request).result()->cached_tokens(), 0);
  request.mutable_prefix_cache()->set_bypass(false);
  request.mutable_prefix_cache()->set_salt("tenant a");
  EXPECT_EQ(Prefill(request).result()->cached_tokens(), 512);
  EXPECT_EQ(engine_->last_salt(), "tenant a");
}

TEST_F(PrefixCacheTest, TenantsShareNothing) {
  options_.tenant_evidence.source = TenantSource::kMetadata;
  options_.tenant_evidence.metadata_key = "x-tenant";
  options_.tenants = *Tenants::Parse(R"({"tenants": [{"name": "a"}, {"name": "b"}]})");
  StartServer();
  v1::PrefillRequest request = PromptOf(600);
  request.mutable_prefix_cache()->set_salt("same");
  for (const std::string tenant : {"a", "b"}) {
    grpc::ClientContext context;
    context.AddMetadata("x-tenant", tenant);
    const auto call = stub_->Prefill(&context, request);
    v1::PrefillEvent event;
    while (call->Read(&event)) {
    }
    EXPECT_TRUE(call->Finish().ok());
    EXPECT_EQ(engine_->last_salt(), tenant + "\nsame");
  }
}

TEST_F(PrefixCacheTest, ASaltHasALimit) {
  StartServer();
  v1::PrefillRequest request = PromptOf(600);
  request.mutable_prefix_cache()->set_salt(std::string(129, 'a'));
  const grpc::Status status = Prefill(request).status;
  EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  EXPECT_THAT(status.error_message(), HasSubstr("prefix_cache.salt"));
  EXPECT_THAT(status.error_message(), HasSubstr("128"));
}

TEST_F(PrefixCacheTest, InfoAndMetricsShowItsUse) {
  StartServer();
  Prefill(PromptOf(600));
  EXPECT_EQ(Info().prefix_cache().block_tokens(), 128);
  EXPECT_EQ(Info().prefix_cache().capacity_bytes(), 1'000'000);
  EXPECT_EQ(Info().prefix_cache().used_bytes(), 4000);  // a block for each of 4 layers
  EXPECT_TRUE(Eventually([this] { return Metric("prefilld_prefix_cache_hits_total") == 4; }));
  EXPECT_EQ(Metric("prefilld_prefix_cache_lookups_total"), 4);
  EXPECT_EQ(Metric("prefilld_prefix_cache_hit_tokens_total"), 512);
  EXPECT_EQ(Metric("prefilld_prefix_cache_stored_blocks_total"), 4);
  EXPECT_EQ(Metric("prefilld_prefix_cache_evicted_blocks_total"), 0);
  EXPECT_EQ(Metric("prefilld_prefix_cache_load_seconds_total"), 0.5);
  EXPECT_EQ(Metric("prefilld_prefix_cache_bytes"), 4000);
  EXPECT_EQ(Metric("prefilld_prefix_cache_capacity_bytes"), 1'000'000);
  EXPECT_EQ(Metric("prefilld_step_tokens_total"), 4 * (600 - 512));
}

TEST_F(PrefixCacheTest, AServerWithoutOneSaysSo) {
  engine_options_.cached_tokens = 0;
  StartServer();
  EXPECT_EQ(Prefill(PromptOf(600)).result()->cached_tokens(), 0);
  EXPECT_FALSE(Info().has_prefix_cache());
}

}  // namespace
}  // namespace prefilld::server
