#include "client/decode_worker/scaled_elements.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "proto/wire/e4m3.h"
#include "proto/wire/kv_layout.h"

namespace prefilld::client {
namespace {

using ::prefill::v1::KvLayout;

constexpr int kBlocks = 3, kTokens = 16, kHeads = 2, kDim = 64;

// Each element is multiplied by the scale that lies where the contract says: 4 bytes from where an
// array of elements with a head_dim of 1 would have it.
TEST(Unscale, MultipliesEachElementByTheScaleOfItsVector) {
  for (const auto order : {::prefill::v1::KV_ORDER_NHD, ::prefill::v1::KV_ORDER_HND}) {
    for (const auto scales :
         {::prefill::v1::KV_SCALES_PER_TOKEN, ::prefill::v1::KV_SCALES_PER_BLOCK}) {
      KvLayout layout;
      layout.set_dtype(::prefill::v1::DTYPE_FP8_E4M3);
      layout.set_order(order);
      layout.set_scales(scales);
      layout.set_block_tokens(kTokens);
      layout.set_num_heads(kHeads);
      layout.set_head_dim(kDim);
      std::mt19937 random(1);
      // The payload begins at an odd address.
      std::vector<uint8_t> bytes(kBlocks * wire::KvPairBytes(layout) + 1);
      uint8_t* payload = bytes.data() + 1;
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random() % 0x7f);
      const int64_t num_scales =
          static_cast<int64_t>(bytes.size() - 1 - wire::ScalesOffset(layout, kBlocks)) / 4;
      std::vector<float> scale_values;
      for (int64_t i = 0; i < num_scales; ++i) {
        scale_values.push_back(static_cast<float>(random() % 1000) / 7.0f);
      }
      std::memcpy(payload + wire::ScalesOffset(layout, kBlocks), scale_values.data(),
                  scale_values.size() * sizeof(float));

      constexpr int kElements = kBlocks * kTokens * kHeads * kDim;
      const bool by_token = order == ::prefill::v1::KV_ORDER_NHD;
      const bool per_block = scales == ::prefill::v1::KV_SCALES_PER_BLOCK;
      for (const bool is_value : {false, true}) {
        std::vector<float> actual(kElements);
        Unscale(layout, kBlocks, is_value, payload, kernels::DType::kFp32,
                reinterpret_cast<uint8_t*>(actual.data()));
        std::vector<uint16_t> bf16(kElements);
        Unscale(layout, kBlocks, is_value, payload, kernels::DType::kBf16,
                reinterpret_cast<uint8_t*>(bf16.data()));
        for (int i = 0; i < kElements; ++i) {
          const int row = i / kDim, block = row / (kTokens * kHeads);
          const int head = by_token ? row % kHeads : row / kTokens % kHeads;
          const int scale = per_block ? block * kHeads + head : row;
          const float expected = wire::E4m3Value(payload[i + (is_value ? kElements : 0)]) *
                                 scale_values[scale + (is_value ? num_scales / 2 : 0)];
          ASSERT_EQ(actual[i], expected) << i;
          const uint32_t bits = uint32_t{bf16[i]} << 16;
          float rounded;
          std::memcpy(&rounded, &bits, sizeof(rounded));
          ASSERT_LE(std::fabs(rounded - expected), std::fabs(expected) * 0x1p-8f) << i;
        }
      }
    }
  }
}

TEST(Unscale, ANanStaysOne) {
  KvLayout layout;
  layout.set_dtype(::prefill::v1::DTYPE_FP8_E4M3);
  layout.set_order(::prefill::v1::KV_ORDER_NHD);
  layout.set_scales(::prefill::v1::KV_SCALES_PER_BLOCK);
  layout.set_block_tokens(kTokens);
  layout.set_num_heads(1);
  layout.set_head_dim(kDim);
  std::vector<uint8_t> payload(wire::KvPairBytes(layout));  // all scales are 0
  payload[5] = 0x7f;
  payload[6] = 0xff;
  std::vector<float> fp32(kTokens * kDim);
  Unscale(layout, 1, false, payload.data(), kernels::DType::kFp32,
          reinterpret_cast<uint8_t*>(fp32.data()));
  EXPECT_TRUE(std::isnan(fp32[5]) && std::isnan(fp32[6]));
  EXPECT_EQ(fp32[7], 0.0f);
  std::vector<uint16_t> bf16(kTokens * kDim);
  Unscale(layout, 1, false, payload.data(), kernels::DType::kBf16,
          reinterpret_cast<uint8_t*>(bf16.data()));
  EXPECT_EQ(bf16[5] & 0x7fc0, 0x7fc0);
  EXPECT_EQ(bf16[7], 0);
}

// No sender of ours has such scales.
TEST(Unscale, AScaleThatIsNotFiniteMakesNoFiniteNumber) {
  KvLayout layout;
  layout.set_dtype(::prefill::v1::DTYPE_FP8_E4M3);
  layout.set_order(::prefill::v1::KV_ORDER_NHD);
  layout.set_scales(::prefill::v1::KV_SCALES_PER_BLOCK);
  layout.set_block_tokens(kTokens);
  layout.set_num_heads(1);
  layout.set_head_dim(kDim);
  std::vector<uint8_t> payload(wire::KvPairBytes(layout));
  payload[1] = 0x7e;
  for (const float scale :
       {std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()}) {
    std::memcpy(&payload[wire::ScalesOffset(layout, 1)], &scale, sizeof(scale));
    std::vector<uint16_t> bf16(kTokens * kDim);
    Unscale(layout, 1, false, payload.data(), kernels::DType::kBf16,
            reinterpret_cast<uint8_t*>(bf16.data()));
    EXPECT_GT(bf16[0] & 0x7fff, 0x7f80) << "0 times " << scale;
    EXPECT_GE(bf16[1] & 0x7fff, 0x7f80) << "448 times " << scale;
  }
}

}  // namespace
}  // namespace prefilld::client
