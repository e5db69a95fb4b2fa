#include "model/device/backend.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

// A refused allocation is an answer here, not the end of the process.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace prefilld::model {
namespace {

std::unique_ptr<Backend> MakeCpuBackend() {
  absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend(DeviceChoice::kCpu, 2);
  EXPECT_TRUE(backend.ok()) << backend.status();
  return *std::move(backend);
}

TEST(CpuBackend, CountsWhatIsAllocatedAndFreed) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend();
  {
    DeviceBuffer a = *backend->Allocate(1000);
    DeviceBuffer b = *backend->AllocateStaging(24);
    EXPECT_EQ(backend->allocated_bytes(), 1024u);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(a.data()) % 64, 0u);
    EXPECT_EQ(a.bytes(), 1000u);

    DeviceBuffer moved = std::move(a);
    EXPECT_EQ(a.data(), nullptr);
    EXPECT_EQ(backend->allocated_bytes(), 1024u);
    moved = std::move(b);
    EXPECT_EQ(backend->allocated_bytes(), 24u);
    EXPECT_EQ(moved.bytes(), 24u);
  }
  EXPECT_EQ(backend->allocated_bytes(), 0u);
}

TEST(CpuBackend, GivesAnEmptyBufferForNoBytes) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend();
  const absl::StatusOr<DeviceBuffer> buffer = backend->Allocate(0);
  ASSERT_TRUE(buffer.ok());
  EXPECT_EQ(buffer->bytes(), 0u);
}

TEST(CpuBackend, RefusesWhatTheMachineLacksByItsSize) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend();
  for (const size_t bytes : {size_t{1} << 60, SIZE_MAX}) {
    const absl::Status status = backend->Allocate(bytes).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_NE(status.message().find(std::to_string(bytes)), std::string::npos) << status;
  }
  EXPECT_EQ(backend->allocated_bytes(), 0u);
}

TEST(CpuBackend, RunsAnOpOnUploadedMemory) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend();
  const std::vector<float> x = {3.0f, 4.0f}, w = {1.0f, 1.0f, 2.0f, 0.0f};
  DeviceBuffer device_x = *backend->Allocate(8), device_w = *backend->Allocate(16),
               device_y = *backend->Allocate(8);
  ASSERT_TRUE(backend->Upload(device_x.data(), x.data(), 8).ok());
  ASSERT_TRUE(backend->Upload(device_w.data(), w.data(), 16).ok());
  kernels::LinearParams params;
  params.x = device_x.data();
  params.w = device_w.data();
  params.y = device_y.data();
  params.num_tokens = 1;
  params.in_features = params.out_features = 2;
  ASSERT_TRUE(backend->Linear(params).ok());
  std::vector<float> y(2);
  ASSERT_TRUE(backend->Download(y.data(), device_y.data(), 8).ok());
  EXPECT_EQ(y, (std::vector<float>{7.0f, 6.0f}));
}

TEST(CpuBackend, MarksAreTimesInOrder) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend();
  for (int mark : {0, 1, 2}) ASSERT_TRUE(backend->Mark(mark).ok());
  const double first = *backend->ElapsedUs(0, 1);
  EXPECT_GE(first, 0.0);
  EXPECT_GE(*backend->ElapsedUs(0, 2), first);
  ASSERT_TRUE(backend->Mark(0).ok());
  EXPECT_LE(*backend->ElapsedUs(0, 2), 0.0) << "a mark may be set anew";
}

TEST(CreateBackend, RefusesANegativeNumberOfThreads) {
  EXPECT_EQ(CreateBackend(DeviceChoice::kCpu, -1).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(CreateBackend, AutoAlwaysFindsADevice) {
  const absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend(DeviceChoice::kAuto, 0);
  ASSERT_TRUE(backend.ok()) << backend.status();
  EXPECT_FALSE((*backend)->device_name().empty());
}

TEST(CreateBackend, CudaIsRefusedWhereThereIsNone) {
  const absl::StatusOr<std::unique_ptr<Backend>> backend = CreateBackend(DeviceChoice::kCuda, 0);
  if (!backend.ok()) {
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kFailedPrecondition) << backend.status();
  }
}

}  // namespace
}  // namespace prefilld::model
