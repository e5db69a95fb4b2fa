#include "proto/wire/kv_layout.h"

#include <cmath>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "absl/strings/ascii.h"
#include "absl/strings/str_join.h"
#include "proto/wire/e4m3.h"
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

TEST(KvLayout, Fp8HasScalesBehindItsElements) {
  auto layout = Layout(::prefill::v1::DTYPE_FP8_E4M3);
  layout.set_scales(::prefill::v1::KV_SCALES_PER_TOKEN);
  EXPECT_EQ(KvTensorBytes(layout), 32 * 3 * (64 + 4));
  EXPECT_EQ(ScalesOffset(layout, 5), 5 * 2 * 32 * 3 * 64);
  layout.set_scales(::prefill::v1::KV_SCALES_PER_BLOCK);
  EXPECT_EQ(KvTensorBytes(layout), 32 * 3 * 64 + 3 * 4);
  EXPECT_EQ(KvPairBytes(layout), 2 * KvTensorBytes(layout));
  EXPECT_EQ(ScalesOffset(layout, 5), 5 * 2 * 32 * 3 * 64);
  EXPECT_EQ(ScalesOffset(Layout(::prefill::v1::DTYPE_BF16), 5),
            5 * KvPairBytes(Layout(::prefill::v1::DTYPE_BF16)));
  EXPECT_FALSE(HasScales(::prefill::v1::DTYPE_BF16));
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

    // A scale lies where an element of a head of one element would, in a block of one token if it
    // is for a block.
    for (const auto scales :
         {::prefill::v1::KV_SCALES_PER_TOKEN, ::prefill::v1::KV_SCALES_PER_BLOCK}) {
      layout.set_scales(scales);
      auto of_scales = layout;
      of_scales.set_head_dim(1);
      const bool per_block = scales == ::prefill::v1::KV_SCALES_PER_BLOCK;
      if (per_block) of_scales.set_block_tokens(1);
      const PayloadStrides expected = StridesOf(of_scales, kBlocks);
      const PayloadStrides actual = ScaleStridesOf(layout, kBlocks);
      EXPECT_EQ(actual.tensor, expected.tensor);
      EXPECT_EQ(actual.block, expected.block);
      EXPECT_EQ(actual.token, per_block ? 0 : expected.token);
      EXPECT_EQ(actual.head, expected.head);
      if (per_block) continue;
      EXPECT_EQ(actual.tensor * kDim, strides.tensor);
      EXPECT_EQ(actual.block * kDim, strides.block);
      EXPECT_EQ(actual.token * kDim, strides.token);
      EXPECT_EQ(actual.head * kDim, strides.head);
    }
  }
}

TEST(KvScales, TheListNamesThoseThatAreKnown) {
  using ::prefill::v1::KvScales;
  std::vector<std::string> known;
  for (int i = 0; i <= ::prefill::v1::KvScales_MAX; ++i) {
    const auto scales = static_cast<KvScales>(i);
    if (IsKvScales(scales)) known.push_back(absl::AsciiStrToUpper(EnumName(scales)));
  }
  EXPECT_EQ(absl::StrJoin(known, ", "), kKvScalesList);
}

TEST(KvDTypes, TheListNamesThoseThatHaveASize) {
  using ::prefill::v1::DType;
  std::vector<std::string> known;
  for (int i = 0; i <= ::prefill::v1::DType_MAX; ++i) {
    const auto dtype = static_cast<DType>(i);
    if (BytesPerElement(dtype) > 0) known.push_back(absl::AsciiStrToUpper(EnumName(dtype)));
  }
  EXPECT_EQ(absl::StrJoin(known, ", "), kKvDTypesList);
}

TEST(E4m3, EveryByteHasItsNumber) {
  EXPECT_EQ(E4m3Value(0x00), 0.0f);
  EXPECT_EQ(E4m3Value(0x01), 0x1p-9f);
  EXPECT_EQ(E4m3Value(0x07), 7 * 0x1p-9f);
  EXPECT_EQ(E4m3Value(0x08), 0x1p-6f);
  EXPECT_EQ(E4m3Value(0x38), 1.0f);
  EXPECT_EQ(E4m3Value(0xc1), -2.25f);
  EXPECT_EQ(E4m3Value(0x7e), 448.0f);
  EXPECT_EQ(E4m3Value(0xfe), -448.0f);
  EXPECT_TRUE(std::isnan(E4m3Value(0x7f)) && std::isnan(E4m3Value(0xff)));
  for (int bits = 1; bits < 0x7f; ++bits) {
    EXPECT_GT(kE4m3Values[bits], kE4m3Values[bits - 1]) << bits;
    EXPECT_EQ(kE4m3Values[bits | 0x80], -kE4m3Values[bits]) << bits;
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
