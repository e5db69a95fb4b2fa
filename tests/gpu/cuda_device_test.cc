#include "model/device/device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <numeric>
#include <thread>
#include <vector>

#include "tests/gpu/device_array.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::model {
namespace {

using kernels::testing::Bf16;

// Memory that another process could map, as consumers of the server's host do.
class SharedPages {
 public:
  explicit SharedPages(size_t bytes) : bytes_((bytes + 4095) / 4096 * 4096) {
    const int fd = memfd_create("pages", MFD_CLOEXEC);
    EXPECT_EQ(ftruncate(fd, static_cast<off_t>(bytes_)), 0);
    data_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
  }
  ~SharedPages() { munmap(data_, bytes_); }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  const size_t bytes_;
  void* data_ = nullptr;
};

class CudaDevice : public kernels::testing::GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    absl::StatusOr<std::unique_ptr<Device>> device = CreateCudaDevice();
    ASSERT_TRUE(device.ok()) << device.status();
    device_ = *std::move(device);
  }

  DeviceBuffer Allocate(size_t bytes) {
    absl::StatusOr<DeviceBuffer> buffer = device_->Allocate(bytes);
    EXPECT_TRUE(buffer.ok()) << buffer.status();
    return buffer.ok() ? *std::move(buffer) : DeviceBuffer();
  }

  std::unique_ptr<Device> device_;
};

TEST_F(CudaDevice, IsNamedAfterTheGpuAndComputesInBf16) {
  EXPECT_FALSE(device_->traits().name.empty());
  EXPECT_EQ(device_->traits().compute_dtype, kernels::DType::kBf16);
}

TEST_F(CudaDevice, CountsTheMemoryItHandsOut) {
  const size_t before = device_->allocated_bytes();
  {
    const DeviceBuffer buffer = Allocate(12345);
    EXPECT_EQ(device_->allocated_bytes(), before + 12345);
  }
  EXPECT_EQ(device_->allocated_bytes(), before);
}

TEST_F(CudaDevice, RefusesMoreMemoryThanThereIsAndWorksOn) {
  const absl::StatusOr<DeviceBuffer> buffer = device_->Allocate(size_t{1} << 50);
  EXPECT_EQ(buffer.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_NE(buffer.status().message().find("1125899906842624"), std::string::npos);
  EXPECT_TRUE(device_->Synchronize().ok());
  EXPECT_NE(Allocate(16).data(), nullptr);
}

TEST_F(CudaDevice, UploadsFromPageableAndPinnedMemory) {
  std::vector<uint32_t> values(100000);
  std::iota(values.begin(), values.end(), 1u);
  const size_t bytes = values.size() * sizeof(uint32_t);
  absl::StatusOr<DeviceBuffer> staging = device_->AllocateStaging(bytes);
  ASSERT_TRUE(staging.ok());
  std::memcpy(staging->data(), values.data(), bytes);
  const DeviceBuffer device = Allocate(bytes);
  for (void* source : {static_cast<void*>(values.data()), staging->data()}) {
    ASSERT_TRUE(device_->Upload(device.data(), source, bytes).ok());
    std::memset(source, 0, bytes);  // the source may be reused on return
    std::vector<uint32_t> back(values.size());
    ASSERT_TRUE(device_->Download(back.data(), device.data(), bytes).ok());
    for (size_t i = 0; i < back.size(); ++i) ASSERT_EQ(back[i], i + 1);
  }
}

TEST_F(CudaDevice, DownloadsBesideLaterOpsWhatEarlierOnesLeft) {
  std::vector<uint32_t> values(1 << 20);
  std::iota(values.begin(), values.end(), 1u);
  const size_t bytes = values.size() * sizeof(uint32_t);
  const DeviceBuffer device = Allocate(bytes);
  absl::StatusOr<DeviceBuffer> staging = device_->AllocateStaging(2 * bytes);
  ASSERT_TRUE(staging.ok());
  ASSERT_TRUE(device_->Mark(0).ok());
  for (const size_t place : {0, 1}) {
    ASSERT_TRUE(device_->Upload(device.data(), values.data(), bytes).ok());
    ASSERT_TRUE(
        device_->StartDownload(staging->as<char>() + place * bytes, device.data(), bytes).ok());
    ASSERT_TRUE(device_->FinishDownloads().ok());
    for (uint32_t& value : values) ++value;
  }
  ASSERT_TRUE(device_->Mark(Device::kNumMarks - 1).ok());
  for (size_t i = 0; i < values.size(); ++i) {
    ASSERT_EQ(staging->as<uint32_t>()[i], i + 1);
    ASSERT_EQ(staging->as<uint32_t>()[values.size() + i], i + 2);
  }
  const absl::StatusOr<double> elapsed = device_->ElapsedUs(0, Device::kNumMarks - 1);
  ASSERT_TRUE(elapsed.ok()) << elapsed.status();
  EXPECT_GT(*elapsed, 0.0);
  EXPECT_LT(*elapsed, 1e7);
}

// Rows go to the device and back by streams of their own; what ops queue behind the loads sees
// them.
TEST_F(CudaDevice, LoadsAndSavesRowsBesideOps) {
  constexpr size_t kRows = 3, kWords = 1 << 18, kStride = kWords + 64;
  constexpr size_t kWord = sizeof(uint32_t);
  HostCopies& copies = device_->host_copies();
  absl::StatusOr<DeviceBuffer> host = device_->AllocateStaging(kRows * kWords * kWord);
  absl::StatusOr<DeviceBuffer> back = device_->AllocateStaging(kRows * kWords * kWord);
  ASSERT_TRUE(host.ok() && back.ok());
  const DeviceBuffer device = Allocate(kRows * kStride * kWord);
  for (uint32_t round = 0; round < 3; ++round) {
    for (size_t i = 0; i < kRows * kWords; ++i) {
      host->as<uint32_t>()[i] = static_cast<uint32_t>(i) + round;
    }
    ASSERT_TRUE(copies
                    .StartLoads({{.dst = device.data(),
                                  .dst_stride = kStride * kWord,
                                  .src = host->data(),
                                  .src_stride = kWords * kWord,
                                  .row_bytes = kWords * kWord,
                                  .rows = kRows}})
                    .ok());
    ASSERT_TRUE(copies.OrderOpsBehindLoads().ok());
    std::vector<uint32_t> seen(kRows * kStride);
    ASSERT_TRUE(device_->Download(seen.data(), device.data(), seen.size() * kWord).ok());
    ASSERT_TRUE(copies
                    .StartSaves({{.dst = back->data(),
                                  .dst_stride = kWords * kWord,
                                  .src = device.data(),
                                  .src_stride = kStride * kWord,
                                  .row_bytes = kWords * kWord,
                                  .rows = kRows}})
                    .ok());
    ASSERT_TRUE(copies.FinishSaves().ok());
    for (size_t i = 0; i < kRows * kWords; ++i) {
      ASSERT_EQ(seen[i / kWords * kStride + i % kWords], i + round);
      ASSERT_EQ(back->as<uint32_t>()[i], i + round);
    }
  }
  ASSERT_TRUE(copies.FinishLoads().ok());
  EXPECT_GT(copies.load_seconds(), 0.0);
  EXPECT_LT(copies.load_seconds(), 10.0);
}

TEST_F(CudaDevice, NamesTheShapeThatItHasNoKernelFor) {
  kernels::AttentionParams params;
  params.num_queries = params.num_keys = 1;
  params.num_heads = params.num_kv_heads = 1;
  params.head_dim = 96;
  const absl::Status status = device_->ops().Attention(params);
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_NE(status.message().find("head_dim 96"), std::string::npos) << status;
  EXPECT_TRUE(device_->Synchronize().ok());
}

TEST_F(CudaDevice, AttentionWithinWhatWasReservedAllocatesNothing) {
  constexpr int64_t kTokens = 2000;
  constexpr int kHeads = 4;
  kernels::AttentionParams params;
  params.num_queries = params.num_keys = kTokens;
  params.kv_head_stride = kTokens * 128;
  params.num_heads = params.num_kv_heads = kHeads;
  params.head_dim = 128;
  const size_t before = device_->allocated_bytes();
  ASSERT_TRUE(device_->ops().ReserveAttention(params, /*block_mass=*/true).ok());
  EXPECT_GT(device_->allocated_bytes(), before);

  const DeviceBuffer tensor = Allocate(kTokens * kHeads * 128 * sizeof(Bf16));
  const DeviceBuffer out = Allocate(tensor.bytes());
  const DeviceBuffer mass = Allocate(kHeads * 16 * 16 * sizeof(float));
  params.q = params.k = params.v = tensor.data();
  params.out = out.data();
  kernels::HeadWork work[kHeads];
  params.work = work;
  params.num_work = kHeads;
  const size_t reserved = device_->allocated_bytes();
  for (const bool block_mass : {false, true}) {
    for (int head = 0; head < kHeads; ++head) {
      work[head] = {.head = head,
                    .block_mass = block_mass ? mass.as<float>() + head * 256 : nullptr};
    }
    for (const int64_t num_tokens : {int64_t{1}, int64_t{700}, kTokens}) {
      params.num_queries = params.num_keys = num_tokens;
      EXPECT_TRUE(device_->ops().Attention(params).ok());
      EXPECT_EQ(device_->allocated_bytes(), reserved) << num_tokens;
    }
  }
  EXPECT_TRUE(device_->Synchronize().ok());
}

kernels::KvScales ScalesFor(kernels::KvOrder order) {
  return order == kernels::KvOrder::kHnd    ? kernels::KvScales::kPerBlock
         : order == kernels::KvOrder::kHn2d ? kernels::KvScales::kPerToken
                                            : kernels::KvScales::kNone;
}

TEST_F(CudaDevice, PacksFromSeveralThreadsBesideOps) {
  // Their 20 MB of bf16 are more than a packing lane has room for at first.
  constexpr int64_t kTokens = 20000;
  constexpr int kHeads = 4;
  constexpr int kHeadDim = 64;
  const std::vector<float> k = kernels::testing::NormalValues(kHeads * kTokens * kHeadDim, 1.0f, 1);
  const std::vector<float> v = kernels::testing::NormalValues(kHeads * kTokens * kHeadDim, 1.0f, 2);
  const DeviceBuffer device_k = Allocate(k.size() * 2);
  const DeviceBuffer device_v = Allocate(v.size() * 2);
  const std::vector<Bf16> k_bits = kernels::testing::ToBf16(k);
  const std::vector<Bf16> v_bits = kernels::testing::ToBf16(v);
  ASSERT_TRUE(device_->Upload(device_k.data(), k_bits.data(), device_k.bytes()).ok());
  ASSERT_TRUE(device_->Upload(device_v.data(), v_bits.data(), device_v.bytes()).ok());
  ASSERT_TRUE(device_->Synchronize().ok());

  kernels::PackKvParams params;
  params.kv_head_stride = kTokens * kHeadDim;
  params.num_tokens = kTokens;
  params.block_tokens = 16;
  params.num_blocks = kTokens / 16;
  params.num_heads = kHeads;
  params.head_dim = kHeadDim;
  params.dst_dtype = kernels::DType::kFp32;
  const auto bytes = static_cast<size_t>(kernels::PackedBytes(params));
  // Each thread packs in another order, and two of them with scales.
  constexpr kernels::KvOrder kOrders[] = {kernels::KvOrder::kNhd, kernels::KvOrder::kHnd,
                                          kernels::KvOrder::kNh2d, kernels::KvOrder::kHn2d};
  std::vector<std::vector<char>> expected;
  for (const kernels::KvOrder order : kOrders) {
    kernels::PackKvParams on_host = params;
    on_host.k = k.data();
    on_host.v = v.data();
    on_host.order = order;
    on_host.scales = ScalesFor(order);
    on_host.dst = expected.emplace_back(bytes).data();
    kernels::reference::PackKv(on_host);
  }

  params.k = device_k.data();
  params.v = device_v.data();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([this, params, bytes, order = kOrders[i], &expected = expected[i]] {
      absl::StatusOr<DeviceBuffer> staging = device_->AllocateStaging(bytes);
      ASSERT_TRUE(staging.ok());
      std::memset(staging->data(), 0xff, bytes);
      kernels::PackKvParams mine = params;
      mine.order = order;
      mine.scales = ScalesFor(order);
      mine.dst = staging->data();
      const auto packed = static_cast<size_t>(kernels::PackedBytes(mine));
      const absl::Status status = device_->PackKv(mine);
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_EQ(std::memcmp(staging->data(), expected.data(), packed), 0);

      const SharedPages pages(bytes);
      absl::StatusOr<DeviceBuffer> adopted = device_->AdoptStaging(pages.data(), pages.bytes());
      ASSERT_TRUE(adopted.ok()) << adopted.status();
      mine.dst = pages.data();
      EXPECT_TRUE(device_->PackKv(mine).ok());
      EXPECT_EQ(std::memcmp(pages.data(), expected.data(), packed), 0);
    });
  }
  const DeviceBuffer y = Allocate(device_k.bytes());
  for (int i = 0; i < 100; ++i) {
    kernels::RmsNormParams norm;
    norm.x = device_k.data();
    norm.weight = device_v.data();
    norm.y = y.data();
    norm.num_tokens = kTokens;
    norm.hidden = kHeads * kHeadDim;
    EXPECT_TRUE(device_->ops().RmsNorm(norm).ok());
  }
  EXPECT_TRUE(device_->Synchronize().ok());
  for (std::thread& thread : threads) thread.join();
}

// This test runs last, because after it the process has lost the device.
TEST_F(CudaDevice, ZFaultOfTheDeviceIsReportedByEveryLaterCall) {
  kernels::RmsNormParams params;
  params.x = reinterpret_cast<void*>(16);
  params.weight = params.x;
  params.y = reinterpret_cast<void*>(16);
  params.num_tokens = 1;
  params.hidden = 8;
  // The launch may succeed, and the fault show only at the next wait.
  device_->ops().RmsNorm(params).IgnoreError();
  EXPECT_EQ(device_->Synchronize().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(device_->Allocate(16).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(device_->ops().RmsNorm(params).code(), absl::StatusCode::kUnavailable);
  device_.reset();
}

}  // namespace
}  // namespace prefilld::model
