#include "server/kv_packer.h"

#include <memory>
#include <set>
#include <utility>
#include <vector>

#include <gmock/gmock.h>

#include "tests/server/job_harness.h"
#include "tests/server/server_fixture.h"

namespace prefilld::server {
namespace {

using ::testing::ElementsAre;
using ::testing::Pair;
using Jobs = std::vector<std::shared_ptr<PrefillJob>>;

constexpr int kBlockTokens = 16;  // a frame holds one block

// A sequence for these jobs, and its source.
struct Layers {
  Layers(Bench& bench, const Jobs& jobs) {
    std::vector<model::PromptInput> prompts;
    for (const auto& job : jobs) prompts.push_back({job->work().tokens, job->work().attention});
    auto started = bench.engine.Start(prompts);
    EXPECT_TRUE(started.ok()) << started.status();
    sequence = *std::move(started);
    source = bench.packer.Add(jobs, *sequence);
  }
  // Computes so many layers.
  void Compute(int num_layers) {
    for (int i = 0; i < num_layers; ++i) {
      ASSERT_TRUE(sequence->RunLayer().ok());
      source->LayerDone(next_layer++);
    }
  }
  bool HasRoom() const {
    const auto room = source->HasRoom();
    EXPECT_TRUE(room.ok()) << room.status();
    return room.ok() && *room;
  }

  std::unique_ptr<model::PrefillSequence> sequence;
  std::unique_ptr<KvPacker::Source> source;  // goes first
  int next_layer = 0;
};

// Checks that a receiver got one frame for each layer and block, with its heads.
void ExpectFrames(const Consumer& consumer, const PrefillJob& receiver, size_t layers) {
  const auto& layout = receiver.work().layout;
  std::set<std::pair<uint32_t, uint32_t>> places;
  for (const ::prefill::v1::KvFrame& frame : consumer.frames()) {
    EXPECT_EQ(frame.payload(),
              ExpectedPayload(static_cast<int>(frame.layer()),
                              SelectBlocks(layout, frame.first_block(), frame.num_blocks()),
                              layout.num_tokens(), static_cast<int>(layout.head_dim())));
    for (uint32_t i = 0; i < frame.num_blocks(); ++i) {
      EXPECT_TRUE(places.insert({frame.layer(), frame.first_block() + i}).second);
    }
  }
  EXPECT_EQ(places.size(), layers * layout.num_blocks());
}

TEST(KvPacker, KeepsALayersSlotUntilItsLastFrameHasLeft) {
  Bench bench({.kv_slots = 2});
  const auto job = bench.NewJob(2 * kBlockTokens);
  Consumer consumer(job);
  Layers layers(bench, {job});
  layers.Compute(2);
  EXPECT_FALSE(layers.HasRoom());
  EXPECT_TRUE(bench.packer.PackOne());
  EXPECT_FALSE(layers.HasRoom());
  const int64_t events = bench.wake.count();
  EXPECT_TRUE(bench.packer.PackOne());
  EXPECT_TRUE(layers.HasRoom());
  EXPECT_GT(bench.wake.count(), events) << "the compute thread hears of the room";
  EXPECT_FALSE(layers.source->HasLeft(*job));
  bench.PackAll();
  EXPECT_TRUE(layers.source->HasLeft(*job));
  EXPECT_EQ(consumer.frames().size(), 4u);
}

// Packs one frame after the other and returns which consumer got each, and of which layer.
std::vector<std::pair<int, int>> PackInTurn(Bench& bench, const std::vector<Consumer*>& consumers) {
  std::vector<std::pair<int, int>> order;
  std::vector<size_t> had(consumers.size(), 0);
  while (bench.packer.PackOne()) {
    for (size_t i = 0; i < consumers.size(); ++i) {
      const auto frames = consumers[i]->frames();
      if (frames.size() > had[i]) order.emplace_back(i, frames.back().layer());
      had[i] = frames.size();
    }
  }
  return order;
}

TEST(KvPacker, PacksTheOldestLayerOfASourceFirstAndItsRequestsInTurn) {
  Bench bench({.max_batch_tokens = 1000});
  const auto first = bench.NewJob(2 * kBlockTokens), second = bench.NewJob(kBlockTokens);
  Consumer to_first(first), to_second(second);
  Layers layers(bench, {first, second});
  layers.Compute(2);
  EXPECT_THAT(PackInTurn(bench, {&to_first, &to_second}),
              ElementsAre(Pair(0, 0), Pair(1, 0), Pair(0, 0), Pair(1, 1), Pair(0, 1), Pair(0, 1)));
}

TEST(KvPacker, LetsTheRequestsOfAllSourcesTakeTurns) {
  Bench bench({.max_batch_tokens = 1000});
  const auto large = bench.NewJob(4 * kBlockTokens), small = bench.NewJob(kBlockTokens);
  Consumer to_large(large), to_small(small);
  Layers of_large(bench, {large}), of_small(bench, {small});
  of_large.Compute(1);
  of_small.Compute(2);
  EXPECT_THAT(PackInTurn(bench, {&to_large, &to_small}),
              ElementsAre(Pair(0, 0), Pair(1, 0), Pair(0, 0), Pair(1, 1), Pair(0, 0), Pair(0, 0)))
      << "the frames of a large layer that was done before hold up nobody";
}

TEST(KvPacker, ASlowConsumerHoldsUpNoOtherSource) {
  Bench bench({.kv_slots = 2}, /*num_buffers=*/4);
  const auto slow = bench.NewJob(10 * kBlockTokens), fast = bench.NewJob(kBlockTokens);
  Consumer to_slow(slow), to_fast(fast);
  to_slow.HoldStill();
  Layers of_slow(bench, {slow}), of_fast(bench, {fast});
  of_slow.Compute(2);
  bench.PackAll();
  EXPECT_EQ(bench.ring->staged_bytes(), bench.ring->capacity_bytes() / 2) << "all of its credit";
  EXPECT_FALSE(of_slow.HasRoom());
  for (int layer = 0; layer < 4; ++layer) {
    of_fast.Compute(1);
    bench.PackAll();
    EXPECT_TRUE(of_fast.HasRoom());
    EXPECT_TRUE(of_fast.source->HasLeft(*fast));
  }
  EXPECT_EQ(to_fast.frames().size(), 4u);
  EXPECT_FALSE(of_slow.HasRoom());
  slow->Abort(Outcome::kStalled, absl::AbortedError("it took nothing"));
  to_slow.TakeOne();
}

TEST(KvPacker, DropsTheFramesOfARequestThatHasEnded) {
  Bench bench({.kv_slots = 2});
  const auto job = bench.NewJob(4 * kBlockTokens);
  Consumer consumer(job);
  Layers layers(bench, {job});
  layers.Compute(2);
  EXPECT_TRUE(bench.packer.PackOne());
  job->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
  EXPECT_FALSE(bench.packer.PackOne());
  EXPECT_TRUE(layers.HasRoom());
  EXPECT_TRUE(layers.source->HasLeft(*job));
  EXPECT_EQ(consumer.frames().size(), 1u);
}

TEST(KvPacker, CachedKvNeedsNoLayerAndStandsBackBehindFinishedOnes) {
  Bench bench({.num_layers = 2, .kv_slots = 2, .cached_tokens = 2 * kBlockTokens});
  const auto job = bench.NewJob(3 * kBlockTokens);
  Consumer consumer(job);
  Layers layers(bench, {job});
  layers.source->StartCached();
  const auto place_of_next = [&] {
    EXPECT_TRUE(bench.packer.PackOne());
    const ::prefill::v1::KvFrame frame = consumer.frames().back();
    return std::pair(frame.layer(), frame.first_block());
  };
  EXPECT_THAT(place_of_next(), Pair(0, 0));
  layers.Compute(1);
  EXPECT_THAT(place_of_next(), Pair(0, 2)) << "the layer's slot is waited for";
  EXPECT_EQ(bench.engine.held(), 0) << "and free, although cached KV of the layer is to come";
  EXPECT_THAT(place_of_next(), Pair(0, 1));
  EXPECT_THAT(place_of_next(), Pair(1, 0));
  EXPECT_FALSE(layers.source->HasLeft(*job));
  layers.Compute(1);
  EXPECT_THAT(place_of_next(), Pair(1, 2));
  EXPECT_FALSE(layers.source->HasLeft(*job));
  EXPECT_THAT(place_of_next(), Pair(1, 1));
  EXPECT_TRUE(layers.source->HasLeft(*job));
  EXPECT_FALSE(bench.packer.PackOne());
  ExpectFrames(consumer, *job, 2);
  EXPECT_EQ(bench.engine.cached_packs(), 4);
}

TEST(KvPacker, CachedKvOfARequestThatHasEndedIsDropped) {
  Bench bench({.cached_tokens = 8 * kBlockTokens});
  const auto job = bench.NewJob(9 * kBlockTokens);
  Consumer consumer(job);
  Layers layers(bench, {job});
  layers.source->StartCached();
  EXPECT_TRUE(bench.packer.PackOne());
  job->Abort(Outcome::kCancelled, absl::CancelledError("enough"));
  EXPECT_FALSE(bench.packer.PackOne());
  EXPECT_TRUE(layers.source->HasLeft(*job));
  EXPECT_EQ(consumer.frames().size(), 1u);
}

// Two requests whose cached KV streams share the ring as any two do.
TEST(KvPacker, CachedKvStaysWithinItsRequestsCreditAndTakesTurns) {
  Bench bench({.cached_tokens = 8 * kBlockTokens}, /*num_buffers=*/8);
  const auto slow = bench.NewJob(9 * kBlockTokens), fast = bench.NewJob(9 * kBlockTokens);
  Consumer to_slow(slow), to_fast(fast);
  to_slow.HoldStill();
  Layers of_slow(bench, {slow}), of_fast(bench, {fast});
  of_slow.source->StartCached();
  bench.PackAll();
  EXPECT_EQ(bench.ring->staged_bytes(), bench.ring->capacity_bytes() / 2) << "all of its credit";
  of_fast.source->StartCached();
  bench.PackAll();
  EXPECT_EQ(to_fast.frames().size(), 4u * 8);
  slow->Abort(Outcome::kStalled, absl::AbortedError("it took nothing"));
  to_slow.TakeOne();
}

TEST(KvPacker, AReceiverThatComesLateGetsCachedKvToo) {
  Bench bench({.kv_slots = 4, .cached_tokens = 2 * kBlockTokens});
  const auto [first, other] = bench.NewShared(3 * kBlockTokens);
  Consumer to_first(first);
  Layers layers(bench, {first});
  layers.source->StartCached();
  layers.Compute(2);
  bench.PackAll();
  ASSERT_TRUE(first->Join(other).ok());
  Consumer to_other(other);
  bench.packer.AdmitReceivers();
  bench.PackAll();
  layers.Compute(2);
  bench.PackAll();
  EXPECT_TRUE(layers.source->HasLeft(*other));
  ExpectFrames(to_first, *first, 4);
  ExpectFrames(to_other, *other, 4);
}

TEST(KvPacker, ASourceThatIsDestroyedLetsGoOfItsSequence) {
  Bench bench;
  const auto job = bench.NewJob(4 * kBlockTokens);
  Consumer consumer(job);
  Layers layers(bench, {job});
  layers.Compute(2);
  EXPECT_EQ(bench.engine.held(), 2);
  layers.source.reset();
  EXPECT_EQ(bench.engine.held(), 0);
  EXPECT_FALSE(bench.packer.PackOne());
}

TEST(KvPacker, KeepsEveryLayerForAReceiverThatIsAwaited) {
  Bench bench({.kv_slots = 2});
  const auto [first, other] = bench.NewShared(4 * kBlockTokens);
  Consumer to_first(first);
  Layers layers(bench, {first});
  layers.Compute(2);
  bench.PackAll();
  EXPECT_TRUE(layers.source->HasLeft(*first));
  EXPECT_FALSE(layers.HasRoom());
  ASSERT_TRUE(first->Join(other).ok());
  const int64_t events = bench.wake.count();
  bench.packer.AdmitReceivers();
  EXPECT_GT(bench.wake.count(), events) << "the compute thread hears of the receiver";
  EXPECT_FALSE(layers.source->HasLeft(*other));
  Consumer to_other(other);
  bench.PackAll();
  EXPECT_TRUE(layers.source->HasLeft(*other));
  EXPECT_TRUE(layers.HasRoom());
  layers.Compute(2);
  bench.PackAll();
  EXPECT_TRUE(layers.HasRoom());
  ExpectFrames(to_first, *first, 4);
  ExpectFrames(to_other, *other, 4);
}

TEST(KvPacker, GivesLayersUpOnceNobodyIsAwaited) {
  Bench bench({.kv_slots = 2});
  const auto [first, other] = bench.NewShared(4 * kBlockTokens);
  Consumer to_first(first);
  Layers layers(bench, {first});
  layers.Compute(2);
  bench.PackAll();
  bench.packer.AdmitReceivers();
  EXPECT_FALSE(layers.HasRoom());
  bench.clock.Advance(bench.resources.timeouts.receiver_attach + absl::Seconds(1));
  first->CheckTimers(bench.resources.timeouts, /*queue_position=*/0, /*others_wait=*/false);
  bench.packer.AdmitReceivers();
  EXPECT_TRUE(layers.HasRoom());
}

// A receiver that joins at the very end of a pass leaves nothing to pack behind.
TEST(KvPacker, TakesNoReceiverIntoASourceThatIsClosed) {
  Bench bench({.kv_slots = 2});
  const auto [first, other] = bench.NewShared(4 * kBlockTokens);
  Consumer to_first(first);
  Layers layers(bench, {first});
  layers.Compute(1);
  ASSERT_TRUE(first->Join(other).ok());
  EXPECT_TRUE(layers.source->Close().ok());
  bench.packer.AdmitReceivers();
  EXPECT_FALSE(bench.packer.PackOne());
  EXPECT_EQ(bench.engine.held(), 0);
}

TEST(KvPacker, AFailureToPackIsThatOfItsSourceAlone) {
  Bench bench;
  const auto failing = bench.NewJob(2 * kBlockTokens), other = bench.NewJob(kBlockTokens);
  Consumer to_failing(failing), to_other(other);
  Layers of_failing(bench, {failing}), of_other(bench, {other});
  of_failing.Compute(1);
  bench.engine.FailPacking(absl::InternalError("copy failed"));
  const int64_t events = bench.wake.count();
  bench.PackAll();
  EXPECT_GT(bench.wake.count(), events) << "the compute thread hears of the failure";
  bench.engine.FailPacking(absl::OkStatus());
  EXPECT_EQ(of_failing.source->HasRoom().status().code(), absl::StatusCode::kInternal);
  EXPECT_FALSE(of_failing.source->HasLeft(*failing));
  of_other.Compute(1);
  bench.PackAll();
  EXPECT_TRUE(of_other.HasRoom());
  EXPECT_TRUE(of_other.source->HasLeft(*other));
}

// The only packing thread waits for a consumer that takes nothing. The ring never asks by itself
// whether the thread should give up, so the finished layer must wake it.
TEST(KvPacker, AFinishedLayerWakesAThreadThatWaitsForAnotherPromptsConsumer) {
  Bench bench({.kv_slots = 4, .max_batch_tokens = 10'000}, /*num_buffers=*/8, /*pack_threads=*/1);
  const auto slow = bench.NewJob(100 * kBlockTokens), fast = bench.NewJob(kBlockTokens);
  Consumer to_fast(fast);
  Layers layers(bench, {slow, fast});
  for (int layer = 0; layer < 4; ++layer) {
    layers.Compute(1);
    // The slow request gets half of the ring and no more.
    EXPECT_TRUE(Eventually([&] {
      return layers.source->HasLeft(*fast) &&
             bench.ring->staged_bytes() == bench.ring->capacity_bytes() / 2;
    })) << "layer "
        << layer;
  }
  EXPECT_FALSE(layers.source->HasLeft(*slow));
  slow->Abort(Outcome::kStalled, absl::AbortedError("it took nothing"));
  layers.source.reset();
  EXPECT_TRUE(bench.ring->AwaitIdle(absl::Seconds(5)));
}

// The only packing thread waits for a consumer whose source is then destroyed.
TEST(KvPacker, AThreadThatWaitsForASlowConsumerHoldsUpNoNewSource) {
  Bench bench({}, /*num_buffers=*/8, /*pack_threads=*/1);
  const auto slow = bench.NewJob(100 * kBlockTokens), next = bench.NewJob(kBlockTokens);
  Consumer to_next(next);
  {
    Layers of_slow(bench, {slow});
    of_slow.Compute(1);
    EXPECT_TRUE(
        Eventually([&] { return bench.ring->staged_bytes() == bench.ring->capacity_bytes() / 2; }));
  }
  Layers of_next(bench, {next});
  of_next.Compute(1);
  EXPECT_TRUE(Eventually([&] { return of_next.source->HasLeft(*next); }));
  slow->Abort(Outcome::kStalled, absl::AbortedError("it took nothing"));
}

}  // namespace
}  // namespace prefilld::server
