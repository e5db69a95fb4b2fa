// Tests offsets beyond 2^31 elements, as a prompt of a million tokens has them, in memory that is
// mapped but hardly touched.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <algorithm>
#include <vector>

#include "kernels/cpu/ops.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/structured_qkv.h"

namespace prefilld::kernels::testing {
namespace {

constexpr int64_t kStride = (int64_t{1} << 31) + 4096;  // elements

// Zeros, of twice kStride elements.
class SparseMemory {
 public:
  SparseMemory()
      : data_(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)) {}
  ~SparseMemory() {
    if (ok()) munmap(data_, kBytes);
  }
  SparseMemory(const SparseMemory&) = delete;
  SparseMemory& operator=(const SparseMemory&) = delete;

  bool ok() const { return data_ != MAP_FAILED; }
  float* data() const { return static_cast<float*>(data_); }

 private:
  static constexpr size_t kBytes = 2 * kStride * sizeof(float);
  void* data_;
};

// The KV of a case whose second head begins kStride after the first.
class LargeStrides : public ::testing::Test {
 protected:
  static constexpr AttentionCase kCase = {"", 16, 16, 2, 2, 64, 64, Blocks::kDense};
  static constexpr int64_t kHeadElements = 16 * 64;

  void SetUp() override {
    if (!k_.ok() || !v_.ok()) GTEST_SKIP() << "no address space for " << kStride << " elements";
    for (int64_t h = 0; h < 2; ++h) {
      std::copy_n(data_.qkv.k.data() + h * kHeadElements, kHeadElements, k_.data() + h * kStride);
      std::copy_n(data_.qkv.v.data() + h * kHeadElements, kHeadElements, v_.data() + h * kStride);
    }
  }

  AttentionData data_{kCase};
  SparseMemory k_, v_;
};

TEST_F(LargeStrides, Attention) {
  cpu::Attention(data_.params);
  const std::vector<float> expected = data_.out;
  data_.params.k = k_.data();
  data_.params.v = v_.data();
  data_.params.kv_head_stride = kStride;
  std::fill(data_.out.begin(), data_.out.end(), 0.0f);
  cpu::Attention(data_.params);
  EXPECT_EQ(data_.out, expected);
}

TEST_F(LargeStrides, PackKv) {
  PackKvParams p{data_.qkv.k.data(), data_.qkv.v.data(), kHeadElements, 16, 0, 1, 16, 0, 2, 64};
  std::vector<char> expected(static_cast<size_t>(PackedBytes(p))), actual(expected.size());
  p.dst = expected.data();
  cpu::PackKv(p);
  p.k = k_.data();
  p.v = v_.data();
  p.kv_head_stride = kStride;
  p.dst = actual.data();
  cpu::PackKv(p);
  EXPECT_EQ(actual, expected);
}

TEST_F(LargeStrides, PagedAttentionInAFarBlock) {
  // The 16 tokens of one head make one cache block. The far block is the last that fits into the
  // pool.
  const int32_t near_block = 0, far_block = static_cast<int32_t>(kStride / kHeadElements);
  static_assert(kStride % kHeadElements == 0);
  std::vector<float> scratch(static_cast<size_t>(PagedAttentionScratchFloats(1, 64)));
  std::vector<float> expected(64), actual(64);
  PagedAttentionParams p;
  p.q = data_.qkv.q.data();
  p.k_pool = data_.qkv.k.data() + kHeadElements;
  p.v_pool = data_.qkv.v.data() + kHeadElements;
  p.block_table = &near_block;
  p.out = expected.data();
  p.num_keys = 16;
  p.block_stride = kHeadElements;
  p.token_stride = 64;
  p.num_heads = p.num_kv_heads = 1;
  p.head_dim = 64;
  p.block_tokens = 16;
  p.scale = 0.125f;
  p.scratch = scratch.data();
  cpu::PagedAttention(p);
  p.k_pool = k_.data();
  p.v_pool = v_.data();
  p.block_table = &far_block;
  p.out = actual.data();
  cpu::PagedAttention(p);
  EXPECT_EQ(actual, expected);
}

TEST_F(LargeStrides, QkvRopeWritesTheSecondHead) {
  const std::vector<float> inv_freq(32, 0.1f);
  const std::vector<float> qkv = MakeQkv(1, 1, 6, 1, 64, 4).q;  // one token: 2 + 2 + 2 heads
  std::vector<float> q(2 * 64);
  QkvRopeParams p;
  p.qkv = qkv.data();
  p.inv_freq = inv_freq.data();
  p.q = q.data();
  p.k = k_.data();
  p.v = v_.data();
  p.num_tokens = 1;
  p.kv_head_stride = kStride;
  p.kv_token_stride = 64;
  p.num_heads = p.num_kv_heads = 2;
  p.head_dim = 64;
  cpu::QkvRope(p);
  EXPECT_TRUE(std::equal(qkv.begin() + 5 * 64, qkv.end(), v_.data() + kStride));
}

}  // namespace
}  // namespace prefilld::kernels::testing
