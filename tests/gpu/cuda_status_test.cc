// Tests that errors of CUDA and cuBLASLt become statuses. Needs no GPU.
#include "model/device/cuda_status.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace prefilld::model {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

TEST(CudaStatus, NamesTheErrorOfTheLibraryThatFailed) {
  const absl::Status launch = CudaStatus(cudaErrorLaunchFailure, "gate and up");
  EXPECT_EQ(launch.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(launch.message(),
              AllOf(HasSubstr("gate and up: cudaErrorLaunchFailure"), Not(HasSubstr("CUBLAS"))));
  const absl::Status product = CudaStatus(CUBLAS_STATUS_NOT_SUPPORTED, "gate and up");
  EXPECT_EQ(product.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(product.message(), "gate and up: CUBLAS_STATUS_NOT_SUPPORTED");
  EXPECT_TRUE(CudaStatus(cudaSuccess, "gate and up").ok());
  EXPECT_TRUE(CudaStatus(CUBLAS_STATUS_SUCCESS, "gate and up").ok());
}

TEST(CudaFault, KeepsAFaultOfALaunchButNotARefusal) {
  CudaFault fault;
  EXPECT_FALSE(fault.Check(CUBLAS_STATUS_NOT_SUPPORTED, "linear").ok());
  EXPECT_FALSE(fault.Check(cudaErrorInvalidValue, "linear").ok());
  EXPECT_TRUE(fault.status().ok());
  EXPECT_FALSE(fault.Check(kernels::cuda::LaunchStatus(cudaErrorIllegalAddress), "linear").ok());
  EXPECT_THAT(fault.status().message(), HasSubstr("cudaErrorIllegalAddress"));
}

}  // namespace
}  // namespace prefilld::model
