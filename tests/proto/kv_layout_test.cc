#include "proto/wire/kv_layout.h"

#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "absl/strings/ascii.h"
#include "absl/strings/str_join.h"
#include "proto/wire/enum_names.h"

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

TEST(KvOrders, TheListNamesThoseThatAreKnown) {
  EXPECT_FALSE(IsKvOrder(::prefill::v1::KV_ORDER_UNSPECIFIED));
  std::vector<std::string> known;
  for (int i = 0; i <= ::prefill::v1::KvOrder_MAX; ++i) {
    const auto order = static_cast<::prefill::v1::KvOrder>(i);
    if (IsKvOrder(order)) known.push_back(absl::AsciiStrToUpper(EnumName(order)));
  }
  EXPECT_EQ(absl::StrJoin(known, ", "), kKvOrdersList);
  EXPECT_FALSE(IsKvOrder(static_cast<::prefill::v1::KvOrder>(::prefill::v1::KvOrder_MAX + 1)));
}

// Where the contract places an element, written down once more by the axes of each order.
TEST(KvOrders, EachElementHasItsPlace) {
  using ::prefill::v1::KvOrder;
  auto layout = Layout(::prefill::v1::DTYPE_BF16);
  constexpr int kBlocks = 5, kTokens = 32, kHeads = 3, kDim = 64;
  for (const KvOrder order : {::prefill::v1::KV_ORDER_NHD, ::prefill::v1::KV_ORDER_HND,
                              ::prefill::v1::KV_ORDER_NH2D, ::prefill::v1::KV_ORDER_HN2D}) {
    layout.set_order(order);
    const PayloadStrides strides = StridesOf(layout, kBlocks);
    const int tensor = 1, block = 3, token = 7, head = 2;
    int64_t place = 0;
    switch (order) {
      case ::prefill::v1::KV_ORDER_NHD:
        place = (((tensor * kBlocks + block) * kTokens + token) * kHeads + head) * kDim;
        break;
      case ::prefill::v1::KV_ORDER_HND:
        place = (((tensor * kBlocks + block) * kHeads + head) * kTokens + token) * kDim;
        break;
      case ::prefill::v1::KV_ORDER_NH2D:
        place = (((block * kTokens + token) * kHeads + head) * 2 + tensor) * kDim;
        break;
      default:
        place = (((block * kHeads + head) * kTokens + token) * 2 + tensor) * kDim;
    }
    EXPECT_EQ(tensor * strides.tensor + block * strides.block + token * strides.token +
                  head * strides.head,
              place)
        << KvOrder_Name(order);
  }
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
