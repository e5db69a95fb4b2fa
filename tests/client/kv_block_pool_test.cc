#include "client/decode_worker/kv_block_pool.h"

#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace prefilld::client {
namespace {

TEST(KvBlockPool, ReservationsDoNotOverlapAndComeBack) {
  KvBlockPool pool(10);
  {
    const auto first = pool.Reserve(4);
    const auto second = pool.Reserve(6);
    ASSERT_TRUE(first.ok() && second.ok());
    std::set<int32_t> blocks(first->blocks().begin(), first->blocks().end());
    blocks.insert(second->blocks().begin(), second->blocks().end());
    EXPECT_EQ(blocks.size(), 10);
    EXPECT_EQ(*blocks.begin(), 0);
    EXPECT_EQ(*blocks.rbegin(), 9);
    EXPECT_EQ(pool.free_blocks(), 0);
  }
  EXPECT_EQ(pool.free_blocks(), 10);
}

TEST(KvBlockPool, RefusesWhatDoesNotFitAndTakesNothing) {
  KvBlockPool pool(10);
  const auto held = pool.Reserve(8);
  const auto refused = pool.Reserve(3);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(refused.status().message(), "the request needs 3 KV blocks; free are 2 of 10");
  EXPECT_TRUE(pool.Reserve(2).ok());
}

TEST(KvBlockPool, AMovedReservationReturnsItsBlocksOnce) {
  KvBlockPool pool(10);
  {
    KvReservation a = *pool.Reserve(5);
    KvReservation b = std::move(a);
    b = *pool.Reserve(2);
    EXPECT_EQ(b.blocks().size(), 2);
    EXPECT_EQ(pool.free_blocks(), 8);
  }
  EXPECT_EQ(pool.free_blocks(), 10);
}

}  // namespace
}  // namespace prefilld::client
