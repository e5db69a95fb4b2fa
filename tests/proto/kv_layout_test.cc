#include "proto/wire/kv_layout.h"

#include <string>

#include <gtest/gtest.h>

#include "absl/strings/str_join.h"

namespace prefilld::wire {
namespace {

::prefill::v1::KvLayout Layout(::prefill::v1::DType dtype) {
  ::prefill::v1::KvLayout layout;
  layout.set_dtype(dtype);
  layout.set_block_tokens(32);
  layout.set_num_kv_heads(8);
  layout.set_num_heads(3);
  layout.set_head_dim(64);
  return layout;
}

TEST(KvLayout, APairIsTwoTensorsOfTheHeadsThatAreSent) {
  const auto layout = Layout(::prefill::v1::DTYPE_BF16);
  EXPECT_EQ(KvTensorBytes(layout), 32 * 3 * 64 * 2);
  EXPECT_EQ(KvPairBytes(layout), 2 * KvTensorBytes(layout));
  EXPECT_EQ(KvTensorBytes(Layout(::prefill::v1::DTYPE_FP16)), KvTensorBytes(layout));
  EXPECT_EQ(KvTensorBytes(Layout(::prefill::v1::DTYPE_FP32)), 2 * KvTensorBytes(layout));
  EXPECT_EQ(BytesPerElement(::prefill::v1::DTYPE_UNSPECIFIED), 0);
}

TEST(KvLayout, SizesDoNotOverflow) {
  auto layout = Layout(::prefill::v1::DTYPE_FP32);
  layout.set_block_tokens(128);
  layout.set_num_heads(1024);
  layout.set_head_dim(1 << 20);
  EXPECT_EQ(KvPairBytes(layout), int64_t{2} * 128 * 1024 * (1 << 20) * 4);
}

TEST(KvLayout, TheGreatestPairIsThatOfTheWidestLayout) {
  auto layout = Layout(::prefill::v1::DTYPE_FP32);
  layout.set_block_tokens(kMaxBlockTokens);
  layout.set_num_heads(layout.num_kv_heads());
  EXPECT_EQ(MaxKvPairBytes(layout.num_kv_heads(), layout.head_dim()), KvPairBytes(layout));
}

TEST(BlockTokens, TheTableAndItsTextAgree) {
  for (const uint32_t allowed : {16, 32, 64, 128}) EXPECT_TRUE(IsBlockTokens(allowed));
  for (const int64_t refused : {-16, 0, 1, 15, 17, 48, 256}) EXPECT_FALSE(IsBlockTokens(refused));
  EXPECT_EQ(absl::StrJoin(kBlockTokens, ", "), kBlockTokensList);
  EXPECT_EQ(kDefaultBlockTokens, 16);
  EXPECT_EQ(kMaxBlockTokens, 128);
}

}  // namespace
}  // namespace prefilld::wire
