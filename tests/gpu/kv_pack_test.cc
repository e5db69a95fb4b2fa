#include "kernels/cuda/kv_pack.h"

#include <cstring>
#include <vector>

#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

class CudaPackKv : public GpuTestWithParam<PackCase> {};

TEST_P(CudaPackKv, GivesTheBytesOfTheReference) {
  const PackCase& c = GetParam();
  // The distance between heads has room for two more tokens.
  const int64_t stride = (c.num_tokens + 2) * c.head_dim;
  const auto count = static_cast<size_t>(c.num_kv_heads * stride);
  // The values are so large that some are out of range for fp16.
  const std::vector<float> k = NormalValues(count, 30000.0f, 1);
  const std::vector<float> v = NormalValues(count, 1.0f, 2);
  const DeviceArray<Bf16> device_k(ToBf16(k)), device_v(ToBf16(v));
  for (const KvOrder order : kPackOrders) {
    for (const DType dtype : {DType::kBf16, DType::kFp16, DType::kFp32}) {
      PackKvParams p;
      p.k = k.data();
      p.v = v.data();
      p.kv_head_stride = stride;
      p.num_tokens = c.num_tokens;
      p.first_block = c.first_block;
      p.num_blocks = c.num_blocks;
      p.block_tokens = c.block_tokens;
      p.first_head = c.first_head;
      p.num_heads = c.num_heads;
      p.head_dim = c.head_dim;
      p.order = order;
      p.dst_dtype = dtype;
      // The buffer is eight bytes longer, so that writes past the end show.
      std::vector<char> expected(static_cast<size_t>(PackedBytes(p)) + 8, static_cast<char>(0xff));
      p.dst = expected.data();
      reference::PackKv(p);
      const DeviceArray<char> actual(expected.size());
      p.k = device_k.data();
      p.v = device_v.data();
      p.dst = actual.data();
      PREFILLD_ASSERT_CUDA(cuda::LaunchPackKv(p, nullptr));
      EXPECT_EQ(actual.Read(), expected) << Name(dtype) << " in order " << static_cast<int>(order);
      if (dtype != DType::kBf16) continue;
      void* pinned = nullptr;
      PREFILLD_ASSERT_CUDA(cudaMallocHost(&pinned, expected.size()));
      std::memset(pinned, 0xff, expected.size());
      p.dst = pinned;
      PREFILLD_ASSERT_CUDA(cuda::CopyKvToHost(p, nullptr));
      PREFILLD_ASSERT_CUDA(cudaStreamSynchronize(nullptr));
      EXPECT_EQ(std::memcmp(pinned, expected.data(), expected.size()), 0)
          << "copied to the host in order " << static_cast<int>(order);
      PREFILLD_ASSERT_CUDA(cudaFreeHost(pinned));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CudaPackKv, ::testing::ValuesIn(PackCases()),
                         CaseName<::testing::TestParamInfo<PackCase>>);

}  // namespace
}  // namespace prefilld::kernels::testing
