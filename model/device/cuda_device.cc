#include "model/device/device.h"

#include <cuda_runtime_api.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "model/device/cuda_host_copies.h"
#include "model/device/cuda_ops.h"
#include "model/device/cuda_pack_lanes.h"
#include "model/device/cuda_recordings.h"
#include "model/device/cuda_status.h"
#include "proto/status_macros.h"

namespace prefilld::model {
namespace {

class CudaDevice final : public Device {
 public:
  static absl::StatusOr<std::unique_ptr<Device>> Create(int ordinal);
  ~CudaDevice() override;

  const DeviceTraits& traits() const override { return traits_; }
  Ops& ops() override { return *ops_; }
  HostCopies& host_copies() override { return *host_copies_; }
  // Counts device memory only.
  size_t allocated_bytes() const override { return allocated_bytes_.load(); }

  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes) override;
  absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) override;
  absl::StatusOr<DeviceBuffer> AdoptStaging(void* data, size_t bytes) override;

  absl::Status Upload(void* dst, const void* src, size_t bytes) override;
  absl::Status Download(void* dst, const void* src, size_t bytes) override;
  absl::Status StartDownload(void* dst, const void* src, size_t bytes) override;
  absl::Status FinishDownloads() override;
  absl::Status Synchronize() override;
  absl::Status Mark(int mark) override;
  absl::StatusOr<double> ElapsedUs(int from, int to) override;
  int64_t num_recordings() const override { return recordings_.count(); }
  absl::Status Repeat(const RecordingKey& key, absl::FunctionRef<absl::Status()> ops) override;

  absl::Status PackKv(const kernels::PackKvParams& params) override;

 protected:
  void Free(MemoryKind kind, void* data, size_t bytes) override;

 private:
  explicit CudaDevice(int ordinal) : ordinal_(ordinal) {}
  absl::Status Initialize();

  // Records `ops` as a graph without running them.
  absl::StatusOr<cudaGraphExec_t> Record(absl::FunctionRef<absl::Status()> ops);

  const int ordinal_;
  DeviceTraits traits_ = {
      .compute_dtype = kernels::DType::kBf16, .asynchronous = true, .records = true};
  std::atomic<size_t> allocated_bytes_{0};
  CudaFault fault_;
  cudaStream_t stream_ = nullptr;  // runs the ops
  cudaStream_t download_stream_ = nullptr;
  cudaEvent_t download_ready_ = nullptr;  // recorded on stream_ when the source is written
  cudaEvent_t marks_[kNumMarks] = {};
  CudaPackLanes pack_lanes_;
  CudaRecordings recordings_;
  bool recording_ = false;          // ops are recorded, not run
  bool recordings_failed_ = false;  // nothing more is recorded then
  std::unique_ptr<CudaOps> ops_;    // run on stream_
  std::unique_ptr<CudaHostCopies> host_copies_;
};

absl::StatusOr<std::unique_ptr<Device>> CudaDevice::Create(int ordinal) {
  auto device = std::unique_ptr<CudaDevice>(new CudaDevice(ordinal));
  PREFILLD_RETURN_IF_ERROR(device->Initialize());
  return device;
}

absl::Status CudaDevice::Initialize() {
  PREFILLD_RETURN_IF_ERROR(fault_.Check(cudaSetDevice(ordinal_), "cudaSetDevice"));
  cudaDeviceProp properties;
  PREFILLD_RETURN_IF_ERROR(
      fault_.Check(cudaGetDeviceProperties(&properties, ordinal_), "cudaGetDeviceProperties"));
  if (properties.major < 8) {
    return absl::FailedPreconditionError(absl::StrCat(properties.name, " has compute capability ",
                                                      properties.major, ".", properties.minor,
                                                      "; 8.0 or newer is needed"));
  }
  traits_.name = properties.name;
  traits_.parallel_tiles = properties.multiProcessorCount;
  for (cudaStream_t* stream : {&stream_, &download_stream_}) {
    PREFILLD_RETURN_IF_ERROR(
        fault_.Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate"));
  }
  PREFILLD_RETURN_IF_ERROR(fault_.Check(
      cudaEventCreateWithFlags(&download_ready_, cudaEventDisableTiming), "cudaEventCreate"));
  for (cudaEvent_t& mark : marks_) {
    PREFILLD_RETURN_IF_ERROR(fault_.Check(cudaEventCreate(&mark), "cudaEventCreate"));
  }
  PREFILLD_RETURN_IF_ERROR(fault_.Check(pack_lanes_.Reserve(), "reserving memory to pack KV"));
  ops_ = std::make_unique<CudaOps>(this, stream_, &fault_, &recordings_);
  PREFILLD_RETURN_IF_ERROR(ops_->Initialize());
  host_copies_ = std::make_unique<CudaHostCopies>(stream_, &fault_);
  return host_copies_->Initialize();
}

CudaDevice::~CudaDevice() {
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  recordings_.Clear();
  ops_.reset();
  host_copies_.reset();
  if (download_stream_ != nullptr) {
    cudaStreamSynchronize(download_stream_);
    cudaStreamDestroy(download_stream_);
  }
  if (download_ready_ != nullptr) cudaEventDestroy(download_ready_);
  for (cudaEvent_t mark : marks_) {
    if (mark != nullptr) cudaEventDestroy(mark);
  }
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::StatusOr<DeviceBuffer> CudaDevice::Allocate(size_t bytes) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  void* data = nullptr;
  const cudaError_t error = cudaMalloc(&data, std::max<size_t>(bytes, 1));
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: the next call must not see it
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    return absl::ResourceExhaustedError(absl::StrCat(
        "no ", bytes, " bytes of device memory: ", free_bytes, " of ", total_bytes, " free"));
  }
  PREFILLD_RETURN_IF_ERROR(fault_.Check(error, "cudaMalloc"));
  allocated_bytes_ += bytes;
  return DeviceBuffer(this, MemoryKind::kDevice, data, bytes);
}

absl::StatusOr<DeviceBuffer> CudaDevice::AllocateStaging(size_t bytes) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, std::max<size_t>(bytes, 1), cudaHostAllocPortable);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(absl::StrCat("no ", bytes, " bytes of pinned host memory"));
  }
  PREFILLD_RETURN_IF_ERROR(fault_.Check(error, "cudaHostAlloc"));
  return DeviceBuffer(this, MemoryKind::kStaging, data, bytes);
}

// A system may refuse to pin memory, which is no fault of the device.
absl::StatusOr<DeviceBuffer> CudaDevice::AdoptStaging(void* data, size_t bytes) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  const cudaError_t error =
      cudaHostRegister(data, bytes, cudaHostRegisterPortable | cudaHostRegisterMapped);
  if (error == cudaErrorMemoryAllocation || error == cudaErrorNotSupported ||
      error == cudaErrorNotPermitted || error == cudaErrorInvalidValue) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(
        absl::StrCat("no ", bytes, " bytes of memory were pinned: ", cudaGetErrorString(error)));
  }
  PREFILLD_RETURN_IF_ERROR(fault_.Check(error, "cudaHostRegister"));
  return DeviceBuffer(this, MemoryKind::kAdopted, data, bytes);
}

void CudaDevice::Free(MemoryKind kind, void* data, size_t bytes) {
  if (kind == MemoryKind::kAdopted) {
    fault_.Check(cudaHostUnregister(data), "cudaHostUnregister").IgnoreError();
    return;
  }
  if (kind == MemoryKind::kStaging) {
    fault_.Check(cudaFreeHost(data), "cudaFreeHost").IgnoreError();
    return;
  }
  fault_.Check(cudaFree(data), "cudaFree").IgnoreError();
  allocated_bytes_ -= bytes;
}

absl::Status CudaDevice::Upload(void* dst, const void* src, size_t bytes) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  if (bytes == 0) return absl::OkStatus();
  // A copy from pageable memory returns once the driver has its own copy. From pinned memory it
  // returns at once, so it has to be waited for before the caller may reuse the source.
  cudaPointerAttributes source = {};
  PREFILLD_RETURN_IF_ERROR(fault_.Check(cudaPointerGetAttributes(&source, src), "upload"));
  PREFILLD_RETURN_IF_ERROR(
      fault_.Check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, stream_), "upload"));
  if (source.type == cudaMemoryTypeUnregistered) return absl::OkStatus();
  return fault_.Check(cudaStreamSynchronize(stream_), "upload");
}

absl::Status CudaDevice::Download(void* dst, const void* src, size_t bytes) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  if (bytes > 0) {
    const cudaError_t error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream_);
    PREFILLD_RETURN_IF_ERROR(fault_.Check(error, "download"));
  }
  return fault_.Check(cudaStreamSynchronize(stream_), "download");
}

absl::Status CudaDevice::StartDownload(void* dst, const void* src, size_t bytes) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  cudaError_t error = cudaEventRecord(download_ready_, stream_);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(download_stream_, download_ready_);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, download_stream_);
  }
  return fault_.Check(error, "download");
}

absl::Status CudaDevice::FinishDownloads() {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return fault_.Check(cudaStreamSynchronize(download_stream_), "download");
}

absl::Status CudaDevice::Synchronize() {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return fault_.Check(cudaStreamSynchronize(stream_), "synchronize");
}

absl::Status CudaDevice::Mark(int mark) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  // In a recording the event must be one that every replay records and that is visible outside of
  // it.
  const unsigned flags = recording_ ? cudaEventRecordExternal : cudaEventRecordDefault;
  return fault_.Check(cudaEventRecordWithFlags(marks_[mark], stream_, flags), "mark");
}

absl::StatusOr<double> CudaDevice::ElapsedUs(int from, int to) {
  for (const int mark : {from, to}) {
    absl::Status status = fault_.Check(cudaEventSynchronize(marks_[mark]), "wait for a mark");
    if (!status.ok()) return status;
  }
  float milliseconds = 0.0f;
  absl::Status status =
      fault_.Check(cudaEventElapsedTime(&milliseconds, marks_[from], marks_[to]), "elapsed time");
  if (!status.ok()) return status;
  return 1e3 * milliseconds;
}

// The first time a key comes, the ops run and find their algorithms. The second time they are
// recorded, and from then on the recording is replayed. If recording fails, for lack of memory
// perhaps, nothing has been queued, and the ops run.
absl::Status CudaDevice::Repeat(const RecordingKey& key, absl::FunctionRef<absl::Status()> ops) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  if (recordings_failed_) return ops();
  if (!recordings_.IsKnown(key)) {
    if (!recordings_.full()) recordings_.MakeKnown(key);
    return ops();
  }
  absl::Status status;
  cudaGraphExec_t graph = recordings_.Find(key);
  if (graph == nullptr) {
    absl::StatusOr<cudaGraphExec_t> recorded = Record(ops);
    if (recorded.ok()) recordings_.Keep(key, graph = *recorded);
    status = recorded.status();
  }
  if (status.ok()) status = fault_.Check(cudaGraphLaunch(graph, stream_), "replaying a layer");
  if (status.ok() || !fault_.status().ok()) return status;
  spdlog::warn("{}: layers of short prompts are launched kernel by kernel from now on",
               std::string(status.message()));
  recordings_failed_ = true;
  PREFILLD_RETURN_IF_ERROR(Synchronize());
  recordings_.Clear();
  return ops();
}

absl::StatusOr<cudaGraphExec_t> CudaDevice::Record(absl::FunctionRef<absl::Status()> ops) {
  cudaGraphExec_t graph = nullptr;
  absl::Status of_ops;
  recording_ = true;
  const cudaError_t error = CudaRecordings::Record(stream_, ops, &of_ops, &graph);
  recording_ = false;
  absl::Status status = fault_.Check(error, "recording a layer");
  status.Update(of_ops);
  if (status.ok())
    status = fault_.Check(cudaGraphUpload(graph, stream_), "placing a recorded layer");
  if (status.ok()) return graph;
  if (graph != nullptr) cudaGraphExecDestroy(graph);
  return status;
}

absl::Status CudaDevice::PackKv(const kernels::PackKvParams& params) {
  PREFILLD_RETURN_IF_ERROR(fault_.status());
  return fault_.Check(pack_lanes_.Pack(params), "pack kv");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice() {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    cudaGetLastError();
    return absl::FailedPreconditionError(absl::StrCat(
        "no CUDA device: ", error == cudaSuccess ? "none visible" : cudaGetErrorString(error)));
  }
  return CudaDevice::Create(0);
}

}  // namespace prefilld::model
