#include "model/device/device.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

// A refused allocation must return an error here instead of ending the process.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace prefilld::model {
namespace {

std::unique_ptr<Device> MakeCpuDevice() {
  absl::StatusOr<std::unique_ptr<Device>> device = CreateDevice(DeviceChoice::kCpu, 2);
  EXPECT_TRUE(device.ok()) << device.status();
  return *std::move(device);
}

TEST(CpuDevice, CountsWhatIsAllocatedAndFreed) {
  const std::unique_ptr<Device> device = MakeCpuDevice();
  {
    DeviceBuffer a = *device->Allocate(1000);
    DeviceBuffer b = *device->AllocateStaging(24);
    EXPECT_EQ(device->allocated_bytes(), 1024u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data()) % 64, 0u);
    EXPECT_EQ(a.bytes(), 1000u);

    DeviceBuffer moved = std::move(a);
    EXPECT_EQ(a.data(), nullptr);
    EXPECT_EQ(device->allocated_bytes(), 1024u);
    moved = std::move(b);
    EXPECT_EQ(device->allocated_bytes(), 24u);
    EXPECT_EQ(moved.bytes(), 24u);
  }
  EXPECT_EQ(device->allocated_bytes(), 0u);
}

TEST(CpuDevice, ComputesAsManyTilesAtATimeAsItHasThreads) {
  EXPECT_EQ(MakeCpuDevice()->traits().parallel_tiles, 2);
}

TEST(CpuDevice, GivesAnEmptyBufferForNoBytes) {
  const std::unique_ptr<Device> device = MakeCpuDevice();
  const absl::StatusOr<DeviceBuffer> buffer = device->Allocate(0);
  ASSERT_TRUE(buffer.ok());
  EXPECT_EQ(buffer->bytes(), 0u);
}

TEST(CpuDevice, RefusesWhatTheMachineLacksByItsSize) {
  const std::unique_ptr<Device> device = MakeCpuDevice();
  for (const size_t bytes : {size_t{1} << 60, SIZE_MAX}) {
    const absl::Status status = device->Allocate(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(status.message().find(std::to_string(bytes)), std::string::npos) << status;
  }
  EXPECT_EQ(device->allocated_bytes(), 0u);
}

TEST(CpuDevice, RunsAnOpOnUploadedMemory) {
  const std::unique_ptr<Device> device = MakeCpuDevice();
  const std::vector<float> x = {3.0f, 4.0f}, w = {1.0f, 1.0f, 2.0f, 0.0f};
  DeviceBuffer device_x = *device->Allocate(8), device_w = *device->Allocate(16),
               device_y = *device->Allocate(8);
  ASSERT_TRUE(device->Upload(device_x.data(), x.data(), 8).ok());
  ASSERT_TRUE(device->Upload(device_w.data(), w.data(), 16).ok());
  kernels::LinearParams params;
  params.x = device_x.data();
  params.w = device_w.data();
  params.y = device_y.data();
  params.num_tokens = 1;
  params.in_features = params.out_features = 2;
  ASSERT_TRUE(device->ops().Linear(params).ok());
  std::vector<float> y(2);
  ASSERT_TRUE(device->Download(y.data(), device_y.data(), 8).ok());
  EXPECT_EQ(y, (std::vector<float>{7.0f, 6.0f}));
}

TEST(CpuDevice, MarksAreTimesInOrder) {
  const std::unique_ptr<Device> device = MakeCpuDevice();
  for (int mark : {0, 1, 2}) ASSERT_TRUE(device->Mark(mark).ok());
  const double first = *device->ElapsedUs(0, 1);
  EXPECT_GE(first, 0.0);
  EXPECT_GE(*device->ElapsedUs(0, 2), first);
  ASSERT_TRUE(device->Mark(0).ok());
  EXPECT_LE(*device->ElapsedUs(0, 2), 0.0) << "a mark may be set anew";
}

TEST(CreateDevice, RefusesANegativeNumberOfThreads) {
  EXPECT_EQ(CreateDevice(DeviceChoice::kCpu, -1).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CreateDevice, AutoAlwaysFindsADevice) {
  const absl::StatusOr<std::unique_ptr<Device>> device = CreateDevice(DeviceChoice::kAuto, 0);
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_FALSE((*device)->traits().name.empty());
}

TEST(CreateDevice, CudaIsRefusedWhereThereIsNone) {
  const absl::StatusOr<std::unique_ptr<Device>> device = CreateDevice(DeviceChoice::kCuda, 0);
  if (!device.ok()) {
    EXPECT_EQ(device.status().code(), absl::StatusCode::kFailedPrecondition) << device.status();
  }
}

}  // namespace
}  // namespace prefilld::model
