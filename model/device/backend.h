// The seam between the layer step and a device: memory, and the ops of kernels/ over it.
#ifndef PREFILLD_MODEL_DEVICE_BACKEND_H_
#define PREFILLD_MODEL_DEVICE_BACKEND_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "kernels/dtype.h"
#include "kernels/kv_pack.h"
#include "kernels/layer_ops.h"
#include "kernels/pattern.h"
#include "kernels/pooled_mass.h"

namespace prefilld::model {

class Backend;

enum class MemoryKind : uint8_t { kDevice, kStaging };

// Memory of a backend, freed on destruction. Move-only. Must not outlive the backend.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Backend* backend, MemoryKind kind, void* data, size_t bytes)
      : backend_(backend), data_(data), bytes_(bytes), kind_(kind) {}
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept;
  ~DeviceBuffer();

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  size_t bytes() const { return bytes_; }

 private:
  Backend* backend_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  MemoryKind kind_ = MemoryKind::kDevice;
};

// One device. Ops are ordered among themselves, may be asynchronous, and report an error at the
// latest from the next Synchronize or Download. Only one thread may call ops; the methods marked
// thread-safe may be called from any thread beside it.
class Backend {
 public:
  virtual ~Backend() = default;

  virtual const std::string& device_name() const = 0;  // "cpu", or the GPU's name
  virtual kernels::DType compute_dtype() const = 0;    // fp32 on the CPU, bf16 on CUDA
  virtual size_t allocated_bytes() const = 0;          // thread-safe

  // Memory is not initialised. RESOURCE_EXHAUSTED names the size that was refused. Thread-safe.
  virtual absl::StatusOr<DeviceBuffer> Allocate(size_t bytes) = 0;
  // Host memory that the device can write to fast (pinned for CUDA). Thread-safe.
  virtual absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) = 0;

  // Host to device, ordered after earlier ops; `src` may be reused on return. Thread-safe for
  // destinations no op touches, but not beside Repeat.
  virtual absl::Status Upload(void* dst, const void* src, size_t bytes) = 0;
  // Device to host after all earlier ops; blocks.
  virtual absl::Status Download(void* dst, const void* src, size_t bytes) = 0;
  // Starts a copy of what earlier ops leave in `src` to `dst`, host memory of AllocateStaging,
  // beside the ops that follow; those must not write `src`. FinishDownloads waits for all such
  // copies, and for no op behind the last of them.
  virtual absl::Status StartDownload(void* dst, const void* src, size_t bytes) = 0;
  virtual absl::Status FinishDownloads() = 0;
  // Waits for all earlier ops.
  virtual absl::Status Synchronize() = 0;
  // Marks the point behind all earlier ops, without waiting for it: marks are numbered 0 ..
  // kNumMarks - 1 and may be set anew. ElapsedUs waits until the device has passed both points and
  // returns the time between them by its own clock; both must have been marked.
  static constexpr int kNumMarks = 16;
  virtual absl::Status Mark(int mark) = 0;
  virtual absl::StatusOr<double> ElapsedUs(int from, int to) = 0;
  // Runs `ops`. Where records() is true, those of a key that comes again may be recorded, Mark
  // included, and replayed without asking `ops`: under one key they enqueue the same work over the
  // same memory, wait for nothing, and do nothing else that matters. A key is anything that tells
  // such works apart.
  using RecordingKey = std::array<int64_t, 4>;
  virtual bool records() const { return false; }
  virtual int64_t num_recordings() const { return 0; }  // held now; thread-safe
  virtual absl::Status Repeat(const RecordingKey& key, absl::FunctionRef<absl::Status()> ops);
  // Runs `ops` and waits for them: the time they took on the device, in milliseconds. For
  // benchmarks. Wall time here; a device with a clock of its own overrides it.
  virtual absl::StatusOr<double> TimeMs(absl::FunctionRef<absl::Status()> ops);

  virtual absl::Status Embedding(const kernels::EmbeddingParams& params) = 0;
  virtual absl::Status RmsNorm(const kernels::RmsNormParams& params) = 0;
  virtual absl::Status Linear(const kernels::LinearParams& params) = 0;
  // Finds the fastest way to compute products of this shape by trying, so that Linear may use it.
  // x and w should hold numbers like those to come; y is overwritten. May take a second or
  // two. Where there is nothing to choose from it does nothing.
  virtual absl::Status TuneLinear(const kernels::LinearParams& params);
  virtual absl::Status QkvRope(const kernels::QkvRopeParams& params) = 0;
  virtual absl::Status SwiGlu(const kernels::SwiGluParams& params) = 0;
  virtual absl::Status GatedLinear(const kernels::GatedLinearParams& params) = 0;
  // As TuneLinear, for GatedLinear and the product within; gate_up and y are overwritten.
  virtual absl::Status TuneGatedLinear(const kernels::GatedLinearParams& params);
  virtual absl::Status TokenLogprobs(const kernels::TokenLogprobsParams& params) = 0;
  virtual absl::Status Attention(const kernels::AttentionParams& params) = 0;
  // Allocates what Attention needs for all heads of this shape at most, with their block mass if it
  // says so, so that no such call allocates; tensors and work are not read. A call that needs more
  // allocates when it comes.
  virtual absl::Status ReserveAttention(const kernels::AttentionParams& largest, bool block_mass);
  virtual absl::Status PagedAttention(const kernels::PagedAttentionParams& params) = 0;

  virtual absl::Status Estimate(const kernels::EstimateParams& params) = 0;
  virtual absl::Status VerticalSlash(const kernels::VerticalSlashParams& params) = 0;
  virtual absl::Status ExpandVerticalSlash(const kernels::ExpandVerticalSlashParams& params) = 0;
  virtual absl::Status SelectRows(const kernels::SelectRowsParams& params) = 0;
  virtual absl::Status MeasurePattern(const kernels::MeasurePatternParams& params) = 0;
  virtual absl::Status PooledMass(const kernels::PooledMassParams& params) = 0;

  // Packs KV that earlier ops have completed (Synchronize, or ElapsedUs to a mark behind them, has
  // returned since) into host memory from AllocateStaging; returns when the bytes are there.
  // Thread-safe: runs beside ops, on a stream of its own.
  virtual absl::Status PackKv(const kernels::PackKvParams& params) = 0;

 protected:
  friend class DeviceBuffer;
  virtual void Free(MemoryKind kind, void* data, size_t bytes) = 0;  // thread-safe
};

enum class DeviceChoice { kAuto, kCpu, kCuda };

// kAuto takes the first CUDA device there is, else the CPU, and logs which and why. kCuda fails
// with FAILED_PRECONDITION when the build or the machine has none. cpu_threads 0 means all cores.
absl::StatusOr<std::unique_ptr<Backend>> CreateBackend(DeviceChoice choice, int cpu_threads);

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_BACKEND_H_
