// Device memory for tests, with copies of tensors to and from it.
#ifndef PREFILLD_TESTS_GPU_DEVICE_ARRAY_H_
#define PREFILLD_TESTS_GPU_DEVICE_ARRAY_H_

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace prefilld::kernels::testing {

// Skips the calling test, with a message, on a machine without a GPU.
inline void SkipWithoutGpu() {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    GTEST_SKIP() << "no CUDA device: " << cudaGetErrorString(error);
  }
}
#define PREFILLD_ASSERT_CUDA(expression) \
  ASSERT_EQ(cudaSuccess, (expression)) << cudaGetErrorString(cudaPeekAtLastError())

class GpuTest : public ::testing::Test {
 protected:
  void SetUp() override { SkipWithoutGpu(); }
};
template <typename Case>
class GpuTestWithParam : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override { SkipWithoutGpu(); }
};

// Fresh memory is filled with 0xff bytes: NaN as bf16, fp16 and fp32, -1 as an integer. So an
// element that a kernel fails to write shows.
template <typename T>
class DeviceArray {
 public:
  DeviceArray() = default;
  explicit DeviceArray(size_t size) : size_(size) {
    EXPECT_EQ(cudaSuccess, cudaMalloc(reinterpret_cast<void**>(&data_), size * sizeof(T) + 1))
        << size * sizeof(T) << " B";
    EXPECT_EQ(cudaSuccess, cudaMemset(data_, 0xff, size * sizeof(T)));
  }
  explicit DeviceArray(const std::vector<T>& values) : DeviceArray(values.size()) {
    Write(0, values.data(), values.size());
  }
  DeviceArray(DeviceArray&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceArray() { cudaFree(data_); }

  T* data() const { return data_; }
  size_t size() const { return size_; }

  void Write(size_t first, const T* values, size_t count) {
    EXPECT_EQ(cudaSuccess,
              cudaMemcpy(data_ + first, values, count * sizeof(T), cudaMemcpyHostToDevice));
  }
  std::vector<T> Read(size_t first, size_t count) const {
    std::vector<T> values(count);
    EXPECT_EQ(cudaSuccess,
              cudaMemcpy(values.data(), data_ + first, count * sizeof(T), cudaMemcpyDeviceToHost));
    return values;
  }
  std::vector<T> Read() const { return Read(0, size_); }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

using Bf16 = uint16_t;  // as bits

std::vector<Bf16> ToBf16(const std::vector<float>& values);
std::vector<float> FromBf16(const std::vector<Bf16>& values);
// Rounds to what bf16 can hold, so that the reference works on exactly the kernel's inputs.
std::vector<float> RoundToBf16(const std::vector<float>& values);

// Makes normal values of the given standard deviation that are exact in bf16.
std::vector<float> NormalValues(size_t count, float deviation, uint32_t seed);

}  // namespace prefilld::kernels::testing

#endif  // PREFILLD_TESTS_GPU_DEVICE_ARRAY_H_
