#include "model/device/cuda_host_copies.h"

#include "proto/status_macros.h"

namespace prefilld::model {

CudaHostCopies::~CudaHostCopies() {
  for (cudaStream_t stream : {loads_, saves_}) {
    if (stream == nullptr) continue;
    cudaStreamSynchronize(stream);
    cudaStreamDestroy(stream);
  }
  for (cudaEvent_t event : {ops_queued_, loads_begin_, loads_end_}) {
    if (event != nullptr) cudaEventDestroy(event);
  }
}

absl::Status CudaHostCopies::Initialize() {
  for (cudaStream_t* stream : {&loads_, &saves_}) {
    PREFILLD_RETURN_IF_ERROR(
        fault_.Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate"));
  }
  for (cudaEvent_t* event : {&ops_queued_, &loads_begin_, &loads_end_}) {
    const unsigned flags = event == &ops_queued_ ? cudaEventDisableTiming : cudaEventDefault;
    PREFILLD_RETURN_IF_ERROR(
        fault_.Check(cudaEventCreateWithFlags(event, flags), "cudaEventCreate"));
  }
  return absl::OkStatus();
}

absl::Status CudaHostCopies::Start(absl::Span<const RowCopy> copies, cudaMemcpyKind kind,
                                   cudaStream_t stream) {
  for (const RowCopy& copy : copies) {
    PREFILLD_RETURN_IF_ERROR(
        fault_.Check(cudaMemcpy2DAsync(copy.dst, copy.dst_stride, copy.src, copy.src_stride,
                                       copy.row_bytes, copy.rows, kind, stream),
                     "copying cached KV"));
  }
  return absl::OkStatus();
}

absl::Status CudaHostCopies::StartLoads(absl::Span<const RowCopy> copies) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  CountLoads();
  cudaError_t error = cudaEventRecord(ops_queued_, ops_);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(loads_, ops_queued_);
  if (error == cudaSuccess) error = cudaEventRecord(loads_begin_, loads_);
  PREFILLD_RETURN_IF_ERROR(fault_.Check(error, "loading cached KV"));
  PREFILLD_RETURN_IF_ERROR(Start(copies, cudaMemcpyHostToDevice, loads_));
  counted_ = false;
  return fault_.Check(cudaEventRecord(loads_end_, loads_), "loading cached KV");
}

void CudaHostCopies::CountLoads() {
  if (counted_) return;
  if (cudaEventQuery(loads_end_) != cudaSuccess) {
    cudaGetLastError();  // "not ready" is no error that the next launch should report
    return;
  }
  counted_ = true;
  float milliseconds = 0.0f;
  if (cudaEventElapsedTime(&milliseconds, loads_begin_, loads_end_) != cudaSuccess) return;
  load_seconds_.store(load_seconds_.load() + 1e-3 * milliseconds);
}

absl::Status CudaHostCopies::OrderOpsBehindLoads() {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return fault_.Check(cudaStreamWaitEvent(ops_, loads_end_), "loading cached KV");
}

absl::Status CudaHostCopies::FinishLoads() {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  PREFILLD_RETURN_IF_ERROR(fault_.Check(cudaStreamSynchronize(loads_), "loading cached KV"));
  CountLoads();
  return absl::OkStatus();
}

absl::Status CudaHostCopies::StartSaves(absl::Span<const RowCopy> copies) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return Start(copies, cudaMemcpyDeviceToHost, saves_);
}

absl::Status CudaHostCopies::FinishSaves() {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return fault_.Check(cudaStreamSynchronize(saves_), "saving KV");
}

}  // namespace prefilld::model
