#include "model/device/cuda_backend.h"

#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <spdlog/spdlog.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "kernels/cuda/attention.h"
#include "kernels/cuda/gated_linear.h"
#include "kernels/cuda/kv_pack.h"
#include "kernels/cuda/layer_ops.h"
#include "kernels/cuda/linear.h"
#include "kernels/cuda/pattern.h"
#include "kernels/cuda/pooled_mass.h"
#include "model/device/cuda_pack_lanes.h"
#include "model/device/cuda_recordings.h"
#include "model/device/cuda_status.h"

namespace prefilld::model {
namespace {

namespace cuda = kernels::cuda;

class CudaBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<Backend>> Create(int device);
  ~CudaBackend() override;

  const std::string& device_name() const override { return device_name_; }
  kernels::DType compute_dtype() const override { return kernels::DType::kBf16; }
  // Device memory only.
  size_t allocated_bytes() const override { return allocated_bytes_.load(); }

  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes) override;
  absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) override;

  absl::Status Upload(void* dst, const void* src, size_t bytes) override;
  absl::Status Download(void* dst, const void* src, size_t bytes) override;
  absl::Status StartDownload(void* dst, const void* src, size_t bytes) override;
  absl::Status FinishDownloads() override;
  absl::Status Synchronize() override;
  absl::Status Mark(int mark) override;
  absl::StatusOr<double> ElapsedUs(int from, int to) override;
  bool records() const override { return true; }
  int64_t num_recordings() const override { return recordings_.count(); }
  absl::Status Repeat(const RecordingKey& key, absl::FunctionRef<absl::Status()> ops) override;
  absl::StatusOr<double> TimeMs(absl::FunctionRef<absl::Status()> ops) override;

  absl::Status Embedding(const kernels::EmbeddingParams& params) override {
    return Launch("embedding", cuda::LaunchEmbedding, params);
  }
  absl::Status RmsNorm(const kernels::RmsNormParams& params) override {
    return Launch("rms norm", cuda::LaunchRmsNorm, params);
  }
  absl::Status Linear(const kernels::LinearParams& params) override;
  absl::Status TuneLinear(const kernels::LinearParams& params) override;
  absl::Status QkvRope(const kernels::QkvRopeParams& params) override {
    return Launch("qkv rope", cuda::LaunchQkvRope, params, params.head_dim);
  }
  absl::Status SwiGlu(const kernels::SwiGluParams& params) override {
    return Launch("swiglu", cuda::LaunchSwiGlu, params);
  }
  absl::Status GatedLinear(const kernels::GatedLinearParams& params) override;
  absl::Status TuneGatedLinear(const kernels::GatedLinearParams& params) override;
  absl::Status TokenLogprobs(const kernels::TokenLogprobsParams& params) override {
    return Launch("token logprobs", cuda::LaunchTokenLogprobs, params);
  }
  absl::Status Attention(const kernels::AttentionParams& params) override;
  absl::Status ReserveAttention(const kernels::AttentionParams& largest, bool block_mass) override;
  absl::Status PagedAttention(const kernels::PagedAttentionParams& params) override {
    return Launch("paged attention", cuda::LaunchPagedAttention, params, params.head_dim);
  }
  absl::Status Estimate(const kernels::EstimateParams& params) override {
    const auto launch = +[](const kernels::EstimateParams& p, cudaStream_t stream) {
      return cuda::LaunchEstimate(p, stream);
    };
    return Launch("estimate", launch, params, params.head_dim, params.block_tokens);
  }
  absl::Status VerticalSlash(const kernels::VerticalSlashParams& params) override {
    return Launch("vertical slash", cuda::LaunchVerticalSlash, params);
  }
  absl::Status ExpandVerticalSlash(const kernels::ExpandVerticalSlashParams& params) override {
    return Launch("expand vertical slash", cuda::LaunchExpandVerticalSlash, params);
  }
  absl::Status SelectRows(const kernels::SelectRowsParams& params) override {
    return Launch("select rows", cuda::LaunchSelectRows, params);
  }
  absl::Status MeasurePattern(const kernels::MeasurePatternParams& params) override {
    return Launch("measure pattern", cuda::LaunchMeasurePattern, params);
  }
  absl::Status PooledMass(const kernels::PooledMassParams& params) override {
    return Launch("pooled mass", cuda::LaunchPooledMass, params, params.head_dim,
                  params.block_tokens);
  }
  absl::Status PackKv(const kernels::PackKvParams& params) override;

 protected:
  void Free(MemoryKind kind, void* data, size_t bytes) override;

 private:
  explicit CudaBackend(int device) : device_(device) {}
  absl::Status Initialize();

  absl::Status LinearStatus(cublasStatus_t status, const kernels::LinearParams& params);
  absl::Status GatedLinearStatus(cublasStatus_t status, const kernels::GatedLinearParams& params);
  // `ops` as a graph, not run.
  absl::StatusOr<cudaGraphExec_t> Record(absl::FunctionRef<absl::Status()> ops);
  // The status of a call; a fault of the device is kept for all later calls.
  absl::Status Check(cudaError_t error, absl::string_view what);
  // The same for a launcher, which refuses shapes as invalid values.
  absl::Status CheckLaunch(cudaError_t error, const char* op, int head_dim, int block_tokens);
  // OK as long as the device works.
  absl::Status Fault() const;
  template <typename Params>
  absl::Status Launch(const char* op, cudaError_t (*launch)(const Params&, cudaStream_t),
                      const Params& params, int head_dim = 0, int block_tokens = 0);
  // Makes attention_scratch_ at least `bytes` long.
  absl::Status ReserveAttentionScratch(size_t bytes);

  const int device_;
  std::string device_name_;
  cudaStream_t stream_ = nullptr;  // of the ops
  cudaStream_t download_stream_ = nullptr;
  cudaEvent_t download_ready_ = nullptr;  // on stream_: its source is written
  cudaEvent_t marks_[kNumMarks] = {};
  cudaEvent_t timing_start_ = nullptr;
  cudaEvent_t timing_end_ = nullptr;
  DeviceBuffer linear_workspace_;
  std::unique_ptr<cuda::LinearLauncher> linear_;
  std::unique_ptr<cuda::GatedLinearLauncher> gated_linear_;  // over linear_
  DeviceBuffer attention_scratch_;                           // grows to what the largest call needs
  CudaPackLanes pack_lanes_;
  CudaRecordings recordings_;
  bool recording_ = false;          // ops are recorded, not run
  bool recordings_failed_ = false;  // so nothing more is recorded

  std::atomic<size_t> allocated_bytes_{0};
  std::atomic<bool> faulted_{false};
  mutable absl::Mutex fault_mu_;
  absl::Status fault_ ABSL_GUARDED_BY(fault_mu_);
};

absl::StatusOr<std::unique_ptr<Backend>> CudaBackend::Create(int device) {
  auto backend = std::unique_ptr<CudaBackend>(new CudaBackend(device));
  if (absl::Status status = backend->Initialize(); !status.ok()) return status;
  return backend;
}

absl::Status CudaBackend::Initialize() {
  if (absl::Status status = Check(cudaSetDevice(device_), "cudaSetDevice"); !status.ok()) {
    return status;
  }
  cudaDeviceProp properties;
  if (absl::Status status =
          Check(cudaGetDeviceProperties(&properties, device_), "cudaGetDeviceProperties");
      !status.ok()) {
    return status;
  }
  if (properties.major < 8) {
    return absl::FailedPreconditionError(absl::StrCat(properties.name, " has compute capability ",
                                                      properties.major, ".", properties.minor,
                                                      "; 8.0 or newer is needed"));
  }
  device_name_ = properties.name;
  for (cudaStream_t* stream : {&stream_, &download_stream_}) {
    if (absl::Status status =
            Check(cudaStreamCreateWithFlags(stream, cudaStreamNonBlocking), "cudaStreamCreate");
        !status.ok()) {
      return status;
    }
  }
  if (absl::Status status = Check(
          cudaEventCreateWithFlags(&download_ready_, cudaEventDisableTiming), "cudaEventCreate");
      !status.ok()) {
    return status;
  }
  std::vector<cudaEvent_t*> events = {&timing_start_, &timing_end_};
  for (cudaEvent_t& mark : marks_) events.push_back(&mark);
  for (cudaEvent_t* event : events) {
    if (absl::Status status = Check(cudaEventCreate(event), "cudaEventCreate"); !status.ok()) {
      return status;
    }
  }
  if (absl::Status status = Check(pack_lanes_.Reserve(), "reserving memory to pack KV");
      !status.ok()) {
    return status;
  }
  allocated_bytes_ += CudaPackLanes::kReservedBytes;
  absl::StatusOr<DeviceBuffer> workspace = Allocate(cuda::LinearLauncher::kWorkspaceBytes);
  if (!workspace.ok()) return workspace.status();
  linear_workspace_ = *std::move(workspace);
  linear_ = std::make_unique<cuda::LinearLauncher>();
  gated_linear_ = std::make_unique<cuda::GatedLinearLauncher>(linear_.get());
  return CublasStatus(linear_->Initialize(linear_workspace_.data(), linear_workspace_.bytes()),
                      "cuBLASLt");
}

CudaBackend::~CudaBackend() {
  if (stream_ != nullptr) cudaStreamSynchronize(stream_);
  recordings_.Clear();
  gated_linear_.reset();
  linear_.reset();
  linear_workspace_ = DeviceBuffer();
  attention_scratch_ = DeviceBuffer();
  if (download_stream_ != nullptr) {
    cudaStreamSynchronize(download_stream_);
    cudaStreamDestroy(download_stream_);
  }
  if (download_ready_ != nullptr) cudaEventDestroy(download_ready_);
  for (cudaEvent_t mark : marks_) {
    if (mark != nullptr) cudaEventDestroy(mark);
  }
  if (timing_start_ != nullptr) cudaEventDestroy(timing_start_);
  if (timing_end_ != nullptr) cudaEventDestroy(timing_end_);
  if (stream_ != nullptr) cudaStreamDestroy(stream_);
}

absl::Status CudaBackend::Check(cudaError_t error, absl::string_view what) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();  // kept by the runtime: the next launch must not take it for its own
  absl::Status status = CudaStatus(error, what);
  if (IsDeviceFault(error)) {
    absl::MutexLock lock(&fault_mu_);
    if (fault_.ok()) fault_ = status;
    faulted_.store(true);
  }
  return status;
}

absl::Status CudaBackend::CheckLaunch(cudaError_t error, const char* op, int head_dim,
                                      int block_tokens) {
  absl::Status status = Check(error, op);
  return error == cudaErrorInvalidValue ? UnsupportedShape(op, head_dim, block_tokens) : status;
}

absl::Status CudaBackend::Fault() const {
  if (!faulted_.load(std::memory_order_relaxed)) return absl::OkStatus();
  absl::MutexLock lock(&fault_mu_);
  return fault_;
}

template <typename Params>
absl::Status CudaBackend::Launch(const char* op, cudaError_t (*launch)(const Params&, cudaStream_t),
                                 const Params& params, int head_dim, int block_tokens) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return CheckLaunch(launch(params, stream_), op, head_dim, block_tokens);
}

absl::StatusOr<DeviceBuffer> CudaBackend::Allocate(size_t bytes) {
  if (absl::Status status = Fault(); !status.ok()) return status;
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
  if (absl::Status status = Check(error, "cudaMalloc"); !status.ok()) return status;
  allocated_bytes_ += bytes;
  return DeviceBuffer(this, MemoryKind::kDevice, data, bytes);
}

absl::StatusOr<DeviceBuffer> CudaBackend::AllocateStaging(size_t bytes) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  void* data = nullptr;
  const cudaError_t error = cudaHostAlloc(&data, std::max<size_t>(bytes, 1), cudaHostAllocPortable);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return absl::ResourceExhaustedError(absl::StrCat("no ", bytes, " bytes of pinned host memory"));
  }
  if (absl::Status status = Check(error, "cudaHostAlloc"); !status.ok()) return status;
  return DeviceBuffer(this, MemoryKind::kStaging, data, bytes);
}

void CudaBackend::Free(MemoryKind kind, void* data, size_t bytes) {
  if (kind == MemoryKind::kStaging) {
    Check(cudaFreeHost(data), "cudaFreeHost").IgnoreError();
    return;
  }
  Check(cudaFree(data), "cudaFree").IgnoreError();
  allocated_bytes_ -= bytes;
}

absl::Status CudaBackend::Upload(void* dst, const void* src, size_t bytes) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  if (bytes == 0) return absl::OkStatus();
  // From pageable memory the call returns once the driver has its own copy; from pinned memory it
  // returns at once, and the caller's right to reuse the source has to be waited for.
  cudaPointerAttributes source = {};
  if (absl::Status status = Check(cudaPointerGetAttributes(&source, src), "upload"); !status.ok()) {
    return status;
  }
  if (absl::Status status =
          Check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, stream_), "upload");
      !status.ok()) {
    return status;
  }
  if (source.type == cudaMemoryTypeUnregistered) return absl::OkStatus();
  return Check(cudaStreamSynchronize(stream_), "upload");
}

absl::Status CudaBackend::Download(void* dst, const void* src, size_t bytes) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  if (bytes > 0) {
    const cudaError_t error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream_);
    if (absl::Status status = Check(error, "download"); !status.ok()) return status;
  }
  return Check(cudaStreamSynchronize(stream_), "download");
}

absl::Status CudaBackend::StartDownload(void* dst, const void* src, size_t bytes) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  cudaError_t error = cudaEventRecord(download_ready_, stream_);
  if (error == cudaSuccess) error = cudaStreamWaitEvent(download_stream_, download_ready_);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, download_stream_);
  }
  return Check(error, "download");
}

absl::Status CudaBackend::FinishDownloads() {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return Check(cudaStreamSynchronize(download_stream_), "download");
}

absl::Status CudaBackend::Synchronize() {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return Check(cudaStreamSynchronize(stream_), "synchronize");
}

absl::Status CudaBackend::Mark(int mark) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  // Within a recording the event is to be recorded by each replay, as one of the outside.
  const unsigned flags = recording_ ? cudaEventRecordExternal : cudaEventRecordDefault;
  return Check(cudaEventRecordWithFlags(marks_[mark], stream_, flags), "mark");
}

absl::StatusOr<double> CudaBackend::ElapsedUs(int from, int to) {
  for (const int mark : {from, to}) {
    absl::Status status = Check(cudaEventSynchronize(marks_[mark]), "wait for a mark");
    if (!status.ok()) return status;
  }
  float milliseconds = 0.0f;
  absl::Status status =
      Check(cudaEventElapsedTime(&milliseconds, marks_[from], marks_[to]), "elapsed time");
  if (!status.ok()) return status;
  return 1e3 * milliseconds;
}

// The first time the ops run, and find their algorithms on the way; the second time they are
// recorded; from then on the recording does. A recording that fails, for lack of memory perhaps,
// has queued nothing: the ops run then.
absl::Status CudaBackend::Repeat(const RecordingKey& key, absl::FunctionRef<absl::Status()> ops) {
  if (absl::Status status = Fault(); !status.ok()) return status;
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
  if (status.ok()) status = Check(cudaGraphLaunch(graph, stream_), "replaying a layer");
  if (status.ok() || !Fault().ok()) return status;
  spdlog::warn("{}: layers of short prompts are launched kernel by kernel from now on",
               std::string(status.message()));
  recordings_failed_ = true;
  if (status = Synchronize(); !status.ok()) return status;
  recordings_.Clear();
  return ops();
}

absl::StatusOr<cudaGraphExec_t> CudaBackend::Record(absl::FunctionRef<absl::Status()> ops) {
  cudaGraphExec_t graph = nullptr;
  absl::Status of_ops;
  recording_ = true;
  const cudaError_t error = CudaRecordings::Record(stream_, ops, &of_ops, &graph);
  recording_ = false;
  absl::Status status = Check(error, "recording a layer");
  status.Update(of_ops);
  if (status.ok()) status = Check(cudaGraphUpload(graph, stream_), "placing a recorded layer");
  if (status.ok()) return graph;
  if (graph != nullptr) cudaGraphExecDestroy(graph);
  return status;
}

absl::StatusOr<double> CudaBackend::TimeMs(absl::FunctionRef<absl::Status()> ops) {
  if (absl::Status status = Check(cudaEventRecord(timing_start_, stream_), "cudaEventRecord");
      !status.ok()) {
    return status;
  }
  if (absl::Status status = ops(); !status.ok()) return status;
  if (absl::Status status = Check(cudaEventRecord(timing_end_, stream_), "cudaEventRecord");
      !status.ok()) {
    return status;
  }
  if (absl::Status status = Synchronize(); !status.ok()) return status;
  float milliseconds = 0.0f;
  if (absl::Status status =
          Check(cudaEventElapsedTime(&milliseconds, timing_start_, timing_end_), "elapsed time");
      !status.ok()) {
    return status;
  }
  return milliseconds;
}

absl::Status CudaBackend::Linear(const kernels::LinearParams& params) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return LinearStatus(linear_->Launch(params, stream_), params);
}

absl::Status CudaBackend::TuneLinear(const kernels::LinearParams& params) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return LinearStatus(linear_->Tune(params, stream_), params);
}

absl::Status CudaBackend::LinearStatus(cublasStatus_t status, const kernels::LinearParams& params) {
  if (status == CUBLAS_STATUS_SUCCESS) return absl::OkStatus();
  // A fault of an earlier kernel shows here as a failure of the library.
  if (absl::Status device = Check(cudaPeekAtLastError(), "linear"); !device.ok()) return device;
  return CublasStatus(status,
                      absl::StrCat("linear [", params.num_tokens, ", ", params.in_features, "] x [",
                                   params.out_features, ", ", params.in_features, "]^T"));
}

absl::Status CudaBackend::GatedLinear(const kernels::GatedLinearParams& params) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return GatedLinearStatus(gated_linear_->Launch(params, stream_), params);
}

absl::Status CudaBackend::TuneGatedLinear(const kernels::GatedLinearParams& params) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  absl::Status status = GatedLinearStatus(gated_linear_->Tune(params, stream_), params);
  if (status.ok()) {
    spdlog::info("gate, up and SwiGLU: {}",
                 gated_linear_->IsFused(params) ? "one kernel" : "cuBLASLt's product, then SwiGLU");
  }
  return status;
}

absl::Status CudaBackend::GatedLinearStatus(cublasStatus_t status,
                                            const kernels::GatedLinearParams& params) {
  // A failure of the product, of SwiGLU behind it or of the kernel that is both.
  return LinearStatus(status, {.num_tokens = params.num_tokens,
                               .in_features = params.in_features,
                               .out_features = 2 * params.intermediate});
}

absl::Status CudaBackend::ReserveAttentionScratch(size_t bytes) {
  if (bytes <= attention_scratch_.bytes()) return absl::OkStatus();
  // In the step path only if a call is larger than what was reserved. Recordings have the old
  // memory in them.
  if (absl::Status status = Synchronize(); !status.ok()) return status;
  recordings_.Clear();
  attention_scratch_ = DeviceBuffer();
  absl::StatusOr<DeviceBuffer> scratch = Allocate(bytes);
  if (!scratch.ok()) return scratch.status();
  attention_scratch_ = *std::move(scratch);
  return absl::OkStatus();
}

absl::Status CudaBackend::ReserveAttention(const kernels::AttentionParams& largest,
                                           bool block_mass) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return ReserveAttentionScratch(
      static_cast<size_t>(cuda::MaxAttentionScratchBytes(largest, block_mass)));
}

absl::Status CudaBackend::Attention(const kernels::AttentionParams& params) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  const int64_t scratch_bytes = cuda::AttentionScratchBytes(params);
  if (absl::Status status = ReserveAttentionScratch(static_cast<size_t>(scratch_bytes));
      !status.ok()) {
    return status;
  }
  return CheckLaunch(cuda::LaunchAttention(params, attention_scratch_.data(), stream_), "attention",
                     params.head_dim, params.block_tokens);
}

absl::Status CudaBackend::PackKv(const kernels::PackKvParams& params) {
  if (absl::Status status = Fault(); !status.ok()) return status;
  return Check(pack_lanes_.Pack(params), "pack kv");
}

}  // namespace

absl::StatusOr<std::unique_ptr<Backend>> CreateCudaBackend() {
  int num_devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&num_devices);
  if (error != cudaSuccess || num_devices == 0) {
    cudaGetLastError();
    return absl::FailedPreconditionError(absl::StrCat(
        "no CUDA device: ", error == cudaSuccess ? "none visible" : cudaGetErrorString(error)));
  }
  return CudaBackend::Create(0);
}

}  // namespace prefilld::model
