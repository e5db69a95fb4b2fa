#include "kernels/cuda/gated_linear.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <utility>
#include <vector>

#include "kernels/cuda/tuning.h"
#include "tests/gpu/device_array.h"
#include "tests/kernels/closeness.h"
#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {
namespace {

using cuda::KernelPath;

// Each rounding to bf16 errs by 2^-9 at most and 2^-10.6 on average. The fused kernel rounds the
// result alone; the two steps round gate and up before it.
constexpr double kFusedTolerance = 3e-3;
constexpr double kTwoStepsTolerance = 6e-3;

struct Shape {
  int64_t num_tokens;
  int64_t in_features;
  int64_t intermediate;
};

// Makes normal values that repeat after some millions, because drawing hundreds of millions takes
// minutes.
DeviceArray<Bf16> LargeNormal(int64_t count, float deviation, uint32_t seed) {
  const size_t size = static_cast<size_t>(count);
  const size_t period = std::min<size_t>(size, (1 << 20) + 7);
  const std::vector<Bf16> values = ToBf16(NormalValues(period, deviation, seed));
  DeviceArray<Bf16> array(size);
  for (size_t first = 0; first < size; first += period) {
    array.Write(first, values.data(), std::min(period, size - first));
  }
  return array;
}

class CudaGatedLinear : public GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    workspace_ = DeviceArray<char>(cuda::LinearLauncher::kWorkspaceBytes);
    ASSERT_EQ(linear_.Initialize(workspace_.data(), workspace_.size()), CUBLAS_STATUS_SUCCESS);
    cuda::GpuTraits gpu;
    ASSERT_EQ(cudaSuccess, cuda::CurrentGpu(&gpu));
    hopper_ = gpu.is_hopper();
  }

  // The tensors of a shape, and the op on them.
  struct Operands {
    Operands(const Shape& shape, DeviceArray<Bf16> x, DeviceArray<Bf16> w)
        : x(std::move(x)),
          w(std::move(w)),
          gate_up(static_cast<size_t>(shape.num_tokens * 2 * shape.intermediate)),
          y(gate_up.size() / 2),
          params{this->x.data(),   this->w.data(),    gate_up.data(),    y.data(),
                 shape.num_tokens, shape.in_features, shape.intermediate} {}
    DeviceArray<Bf16> x, w, gate_up, y;
    GatedLinearParams params;
  };
  // Makes gate and up of about unit variance.
  static Operands Large(const Shape& shape) {
    const float deviation = 1.0f / std::sqrt(static_cast<float>(shape.in_features));
    return Operands(shape, LargeNormal(shape.num_tokens * shape.in_features, 1.0f, 1),
                    LargeNormal(2 * shape.intermediate * shape.in_features, deviation, 2));
  }

  void ExpectReference(KernelPath path, double tolerance);

  DeviceArray<char> workspace_;
  cuda::LinearLauncher linear_;
  cuda::GatedLinearLauncher launcher_{&linear_};
  bool hopper_ = false;
};

// Tests sizes around the kernel's tiles of 128 tokens, 128 columns and 64 features.
void CudaGatedLinear::ExpectReference(KernelPath path, double tolerance) {
  constexpr int64_t kMostTokens = 1000;
  for (const int64_t in : {8, 64, 72, 512, 3584}) {
    for (const int64_t intermediate : {8, 64, 128, 136, 704}) {
      const int64_t most_tokens = in * intermediate < 1 << 20 ? kMostTokens : 300;
      const float deviation = 2.0f / std::sqrt(static_cast<float>(in));
      const std::vector<float> x = NormalValues(static_cast<size_t>(most_tokens * in), 1.0f, 1);
      const std::vector<float> w =
          NormalValues(static_cast<size_t>(2 * intermediate * in), deviation, 2);
      std::vector<float> expected(static_cast<size_t>(most_tokens * intermediate));
      reference::GatedLinear(
          {x.data(), w.data(), nullptr, expected.data(), most_tokens, in, intermediate});
      const DeviceArray<Bf16> device_x(ToBf16(x)), device_w(ToBf16(w));
      for (const int64_t num_tokens : {1, 127, 128, 129, 300, 1000}) {
        if (num_tokens > most_tokens) continue;
        SCOPED_TRACE(::testing::Message()
                     << num_tokens << " tokens, " << in << " -> " << intermediate);
        const size_t size = static_cast<size_t>(num_tokens * intermediate);
        // The output has some rows more, which must stay as they are.
        const DeviceArray<Bf16> gate_up(2 * size), y(size + static_cast<size_t>(intermediate));
        ASSERT_EQ(launcher_.Launch({device_x.data(), device_w.data(), gate_up.data(), y.data(),
                                    num_tokens, in, intermediate},
                                   nullptr, path),
                  CUBLAS_STATUS_SUCCESS);
        const std::vector<float> actual = FromBf16(y.Read());
        const Closeness c = Compare(actual.data(), expected.data(), size);
        EXPECT_EQ(c.wrong_non_finite, 0u);
        EXPECT_LT(c.relative, tolerance) << c;
        for (size_t i = size; i < y.size(); ++i) ASSERT_TRUE(std::isnan(actual[i])) << i;
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(CudaGatedLinear, FusedEqualsReference) {
  if (!hopper_) GTEST_SKIP() << "no Hopper GPU";
  ExpectReference(KernelPath::kHopper, kFusedTolerance);
}

TEST_F(CudaGatedLinear, TwoStepsEqualReference) {
  ExpectReference(KernelPath::kPortable, kTwoStepsTolerance);
}

// Every CTA takes several tiles, and the ring of stages wraps around many times at changing places,
// because its length does not divide the steps of a tile.
TEST_F(CudaGatedLinear, ManyTilesEqualTwoSteps) {
  if (!hopper_) GTEST_SKIP() << "no Hopper GPU";
  for (const Shape& shape : {Shape{2300, 64, 4104}, Shape{2300, 136, 4104}, Shape{4000, 320, 9000},
                             Shape{2100, 3584, 18944}}) {
    SCOPED_TRACE(::testing::Message() << shape.num_tokens << " tokens, " << shape.in_features
                                      << " -> " << shape.intermediate);
    const Operands op = Large(shape);
    ASSERT_EQ(launcher_.Launch(op.params, nullptr, KernelPath::kPortable), CUBLAS_STATUS_SUCCESS);
    const std::vector<float> expected = FromBf16(op.y.Read());
    PREFILLD_ASSERT_CUDA(cudaMemset(op.y.data(), 0xff, op.y.size() * sizeof(Bf16)));
    for (int i = 0; i < 3; ++i) {
      ASSERT_EQ(launcher_.Launch(op.params, nullptr, KernelPath::kHopper), CUBLAS_STATUS_SUCCESS);
    }
    const std::vector<float> actual = FromBf16(op.y.Read());
    const Closeness c = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.relative, kTwoStepsTolerance) << c;
    EXPECT_LT(c.max_absolute, 0.3) << c;  // of values up to 20
  }
}

// Tests that saturated, infinite and NaN values of gate and up give what the formula gives.
TEST_F(CudaGatedLinear, FollowsLargeGatesAndNonFiniteTokens) {
  constexpr int64_t kTokens = 130;
  constexpr int64_t kIn = 64;
  constexpr int64_t kIntermediate = 128;
  std::vector<float> x = NormalValues(kTokens * kIn, 100.0f, 1);
  x[5 * kIn] = INFINITY;
  x[129 * kIn + 3] = NAN;
  const std::vector<float> w = NormalValues(2 * kIntermediate * kIn, 1.0f, 2);
  std::vector<float> expected(kTokens * kIntermediate);
  reference::GatedLinear(
      {x.data(), w.data(), nullptr, expected.data(), kTokens, kIn, kIntermediate});
  const DeviceArray<Bf16> device_x(ToBf16(x)), device_w(ToBf16(w)), gate_up(2 * expected.size());
  for (const KernelPath path : {KernelPath::kHopper, KernelPath::kPortable}) {
    if (path == KernelPath::kHopper && !hopper_) continue;
    const DeviceArray<Bf16> y(expected.size());
    ASSERT_EQ(launcher_.Launch({device_x.data(), device_w.data(), gate_up.data(), y.data(), kTokens,
                                kIn, kIntermediate},
                               nullptr, path),
              CUBLAS_STATUS_SUCCESS);
    const std::vector<float> actual = FromBf16(y.Read());
    const Closeness c = Compare(actual.data(), expected.data(), actual.size());
    EXPECT_EQ(c.wrong_non_finite, 0u);
    EXPECT_LT(c.relative, kTwoStepsTolerance) << c;
  }
}

TEST_F(CudaGatedLinear, TuningHoldsForItsFeaturesAndNotForFewTokens) {
  constexpr Shape kShape = {512, 256, 1024};
  const Operands op = Large(kShape);
  EXPECT_FALSE(launcher_.IsFused(op.params)) << "not tuned";
  ASSERT_EQ(launcher_.Tune(op.params, nullptr), CUBLAS_STATUS_SUCCESS);
  const bool fused = launcher_.IsFused(op.params);
  EXPECT_TRUE(hopper_ || !fused);
  GatedLinearParams other = op.params;
  other.num_tokens = kShape.num_tokens / 4;
  EXPECT_EQ(launcher_.IsFused(other), fused);
  other.num_tokens = kShape.num_tokens / 4 - 1;
  EXPECT_FALSE(launcher_.IsFused(other));
  other = op.params;
  other.intermediate = kShape.intermediate / 2;
  EXPECT_FALSE(launcher_.IsFused(other));
  EXPECT_EQ(launcher_.Launch(op.params, nullptr), CUBLAS_STATUS_SUCCESS);
  PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());
}

TEST_F(CudaGatedLinear, RefusesWhatItHasNoKernelFor) {
  const DeviceArray<Bf16> memory(4096);
  GatedLinearParams params = {memory.data(), memory.data(), memory.data(), memory.data(), 1, 8, 8};
  params.in_features = 12;
  EXPECT_EQ(launcher_.Launch(params, nullptr, KernelPath::kHopper), cudaErrorInvalidValue);
  params.in_features = 8;
  params.intermediate = 12;
  for (const KernelPath path : {KernelPath::kHopper, KernelPath::kPortable}) {
    EXPECT_EQ(launcher_.Launch(params, nullptr, path), cudaErrorInvalidValue);
  }
  params.intermediate = 8;
  params.x = memory.data() + 1;
  EXPECT_EQ(launcher_.Launch(params, nullptr, KernelPath::kHopper), cudaErrorInvalidValue);
  params.x = memory.data();
  params.num_tokens = 0;
  EXPECT_EQ(launcher_.Launch(params, nullptr), CUBLAS_STATUS_SUCCESS);
  PREFILLD_ASSERT_CUDA(cudaDeviceSynchronize());
}

// Prints the time of both ways at the shape of a model of 7 billion parameters.
TEST_F(CudaGatedLinear, TimesAtTheShapeOfAModel) {
  constexpr Shape kShape = {8192, 3584, 18944};
  constexpr int kRepetitions = 10;
  constexpr int kRounds = 9;
  if (!hopper_) GTEST_SKIP() << "no Hopper GPU";
  const Operands op = Large(kShape);
  ASSERT_EQ(launcher_.Tune(op.params, nullptr), CUBLAS_STATUS_SUCCESS);
  const LinearParams product = {.x = op.x.data(),
                                .w = op.w.data(),
                                .y = op.gate_up.data(),
                                .num_tokens = kShape.num_tokens,
                                .in_features = kShape.in_features,
                                .out_features = 2 * kShape.intermediate};
  std::vector<float> two_steps, fused, product_alone;
  for (int round = 0; round < kRounds; ++round) {
    const auto time = [&](const std::function<cuda::LaunchStatus()>& launch,
                          std::vector<float>* ms) {
      ms->push_back(0.0f);
      ASSERT_EQ(cuda::TimeLaunches(launch, kRepetitions, nullptr, &ms->back()),
                CUBLAS_STATUS_SUCCESS);
    };
    time([&] { return launcher_.Launch(op.params, nullptr, KernelPath::kPortable); }, &two_steps);
    time([&] { return launcher_.Launch(op.params, nullptr, KernelPath::kHopper); }, &fused);
    time([&] { return linear_.Launch(product, nullptr); }, &product_alone);
  }
  const double flop = 4.0 * static_cast<double>(kShape.num_tokens * kShape.in_features) *
                      static_cast<double>(kShape.intermediate);
  const auto print = [&](const char* what, const std::vector<float>& times) {
    const double ms = cuda::MedianMs(times) / kRepetitions;
    std::printf("%-24s %.3f ms  %.0f TFLOP/s\n", what, ms, flop / ms / 1e9);
    return ms;
  };
  const double two_steps_ms = print("product and SwiGLU apart", two_steps);
  const double fused_ms = print("fused", fused);
  print("the product alone", product_alone);
  std::printf("apart / fused: %.3f; the tuning takes %s\n", two_steps_ms / fused_ms,
              launcher_.IsFused(op.params) ? "the fused kernel" : "two steps");
}

}  // namespace
}  // namespace prefilld::kernels::testing
