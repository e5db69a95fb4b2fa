#include "kernels/cuda/kv_pack.h"

#include <cstring>
#include <utility>
#include <vector>

#include "kernels/cpu/ops.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/cases.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

using Wire = std::pair<DType, KvScales>;
constexpr Wire kConverted[] = {{DType::kFp16, KvScales::kNone},
                               {DType::kFp32, KvScales::kNone},
                               {DType::kBf16, KvScales::kPerToken},
                               {DType::kBf16, KvScales::kPerBlock}};

// The result is eight bytes longer, so that writes past the end show.
std::vector<char> Expected(PackKvParams p, const std::vector<float>& k,
                           const std::vector<float>& v) {
  std::vector<char> bytes(static_cast<size_t>(PackedBytes(p)) + 8, static_cast<char>(0xff));
  p.k = k.data();
  p.v = v.data();
  p.dst = bytes.data();
  reference::PackKv(p);
  return bytes;
}

// Copies the source, of which `p` has the device's memory, and packs it on the host.
void ExpectConverted(PackKvParams p, const std::vector<float>& k, const std::vector<float>& v) {
  const std::vector<char> expected = Expected(p, k, v);
  const auto source_bytes = static_cast<size_t>(cuda::SourceBytes(p));
  void* source = nullptr;
  PREFILLD_ASSERT_CUDA(cudaMallocHost(&source, source_bytes + 8));
  std::memset(source, 0xff, source_bytes + 8);
  PREFILLD_ASSERT_CUDA(cuda::CopySourceToHost(p, source, nullptr));
  PREFILLD_ASSERT_CUDA(cudaStreamSynchronize(nullptr));
  EXPECT_EQ(std::memcmp(static_cast<char*>(source) + source_bytes,
                        std::vector<char>(8, static_cast<char>(0xff)).data(), 8),
            0);
  std::vector<char> actual(expected.size(), static_cast<char>(0xff));
  p.dst = actual.data();
  cpu::PackKv(cuda::FromSource(p, source));
  EXPECT_EQ(actual, expected) << Name(p.dst_dtype) << ", scales " << static_cast<int>(p.scales)
                              << ", order " << static_cast<int>(p.order);
  PREFILLD_ASSERT_CUDA(cudaFreeHost(source));
}

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
    PackKvParams p;
    p.kv_head_stride = stride;
    p.num_tokens = c.num_tokens;
    p.first_block = c.first_block;
    p.num_blocks = c.num_blocks;
    p.block_tokens = c.block_tokens;
    p.first_head = c.first_head;
    p.num_heads = c.num_heads;
    p.head_dim = c.head_dim;
    p.order = order;
    const std::vector<char> expected = Expected(p, k, v);
    p.k = device_k.data();
    p.v = device_v.data();
    void* pinned = nullptr;
    PREFILLD_ASSERT_CUDA(cudaMallocHost(&pinned, expected.size()));
    std::memset(pinned, 0xff, expected.size());
    p.dst = pinned;
    PREFILLD_ASSERT_CUDA(cuda::CopyKvToHost(p, nullptr));
    PREFILLD_ASSERT_CUDA(cudaStreamSynchronize(nullptr));
    EXPECT_EQ(std::memcmp(pinned, expected.data(), expected.size()), 0)
        << "in order " << static_cast<int>(order);
    PREFILLD_ASSERT_CUDA(cudaFreeHost(pinned));
    for (const auto& [dtype, scales] : kConverted) {
      p.dst_dtype = dtype;
      p.scales = scales;
      ExpectConverted(p, k, v);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Common, CudaPackKv, ::testing::ValuesIn(PackCases()),
                         CaseName<::testing::TestParamInfo<PackCase>>);

}  // namespace
}  // namespace prefilld::kernels::testing
