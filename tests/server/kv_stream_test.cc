#include "server/kv_stream.h"

#include <memory>
#include <utility>
#include <vector>

#include <gtest/gtest.h>

#include "tests/server/fake_engine.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

namespace v1 = ::prefill::v1;

constexpr int kBlockTokens = 16;

// Takes everything at once.
class FastTransport final : public LaneQueue::Transport {
 public:
  explicit FastTransport(LaneQueue* queue) : queue_(queue) {}
  void Send(const grpc::ByteBuffer&, bool) override { queue_->OnWriteDone(true); }
  void End(const absl::Status&) override {}
  void Cancel(const absl::Status&) override {}

 private:
  LaneQueue* const queue_;
};

std::shared_ptr<PrefillJob> NewJob(const model::ModelConfig& config, int num_blocks) {
  PrefillWork work;
  work.tokens.assign(num_blocks * kBlockTokens, 1);
  work.attention.policy = model::AttentionPolicy::kDense;
  work.layout.set_dtype(v1::DTYPE_FP32);
  work.layout.set_order(v1::KV_ORDER_NHD);
  work.layout.set_block_tokens(kBlockTokens);
  work.layout.set_num_layers(config.num_layers);
  work.layout.set_num_kv_heads(config.num_kv_heads);
  work.layout.set_num_heads(config.num_kv_heads);
  work.layout.set_head_dim(config.head_dim);
  work.layout.set_num_tokens(num_blocks * kBlockTokens);
  work.layout.set_num_blocks(num_blocks);
  return std::make_shared<PrefillJob>(std::move(work), Clock::Real());
}

// The one packing thread waits for a consumer that takes nothing, in a ring that does not ask by
// itself whether that is still worth it.
TEST(KvStream, AFinishedLayerWakesAThreadThatWaitsForAnotherPromptsConsumer) {
  FakeEngine engine({.num_layers = 4, .kv_slots = 4, .max_batch_tokens = 10'000});
  const auto slow = NewJob(engine.info().config, 100), fast = NewJob(engine.info().config, 1);
  FastTransport consumer(&fast->delivery().control());
  fast->delivery().control().Attach(&consumer);
  const auto ring =
      StagingRing::Create(engine, 8, BlockBytes(fast->work().layout), absl::InfiniteDuration());
  ASSERT_TRUE(ring.ok()) << ring.status();
  const auto sequence = engine.Start({{slow->work().tokens, slow->work().attention},
                                      {fast->work().tokens, fast->work().attention}});
  ASSERT_TRUE(sequence.ok()) << sequence.status();

  KvStream stream(**ring, engine.kv_slots(), /*num_threads=*/1, [](int, int64_t) {});
  stream.Begin({slow, fast}, **sequence);
  for (int layer = 0; layer < engine.info().config.num_layers; ++layer) {
    ASSERT_TRUE((*sequence)->RunLayer().ok());
    stream.LayerDone(layer);
    // Half of the ring is all that the slow one gets.
    EXPECT_TRUE(Eventually([&] {
      return stream.HasLeft(1) && (*ring)->staged_bytes() == (*ring)->capacity_bytes() / 2;
    })) << "layer "
        << layer;
  }
  EXPECT_FALSE(stream.HasLeft(0));
  slow->Abort(Outcome::kStalled, absl::AbortedError("it took nothing"));
  EXPECT_TRUE(stream.End([](size_t) {}).ok());
  EXPECT_TRUE((*ring)->AwaitIdle(absl::Seconds(5)));
}

}  // namespace
}  // namespace prefilld::server
