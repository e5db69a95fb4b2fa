// The seam between the model and a device: its memory, its time line, and its ops.
#ifndef PREFILLD_MODEL_DEVICE_DEVICE_H_
#define PREFILLD_MODEL_DEVICE_DEVICE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/dtype.h"
#include "kernels/kv_pack.h"
#include "model/device/host_copies.h"
#include "model/device/ops.h"

namespace prefilld::model {

class Device;

enum class MemoryKind : uint8_t { kDevice, kStaging, kAdopted };

// Memory of a device, freed on destruction. Move-only. It must not outlive the device.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  DeviceBuffer(Device* device, MemoryKind kind, void* data, size_t bytes)
      : device_(device), data_(data), bytes_(bytes), kind_(kind) {}
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
  Device* device_ = nullptr;
  void* data_ = nullptr;
  size_t bytes_ = 0;
  MemoryKind kind_ = MemoryKind::kDevice;
};

// The facts about a device by which the model chooses sizes and defaults. Code asks for a trait,
// never for the name.
struct DeviceTraits {
  std::string name = {};  // "cpu", or the GPU's name
  kernels::DType compute_dtype = kernels::DType::kFp32;
  // Ops go on while the host prepares the next ones, and one short prompt does not fill the device.
  // So prompts are batched, layers are queued ahead, and tiles are wide.
  bool asynchronous = false;
  // Repeat records ops and replays them.
  bool records = false;
  // It computes so many query blocks of attention at a time: one on each multiprocessor or thread.
  int parallel_tiles = 1;
};

// One device. Its ops and the copies below are ordered among themselves, in the order of the calls
// of one thread. The methods marked thread-safe may be called from any thread beside it.
//
// It has eighteen methods, because a device has four concerns that share one order of execution:
// memory, copies, points on its time line, and recordings.
class Device {
 public:
  virtual ~Device() = default;

  virtual const DeviceTraits& traits() const = 0;
  virtual Ops& ops() = 0;
  virtual HostCopies& host_copies() = 0;  // beside the ops

  // Memory is not initialised. RESOURCE_EXHAUSTED names the size that was refused. Thread-safe.
  virtual absl::StatusOr<DeviceBuffer> Allocate(size_t bytes) = 0;
  // Host memory that the device can write to fast (pinned for CUDA). Thread-safe.
  virtual absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) = 0;
  // Makes memory of the caller's, whole pages, like that of AllocateStaging for as long as the
  // result lives. An empty result: nothing has to be done for that. RESOURCE_EXHAUSTED: the system
  // does not allow it. Thread-safe.
  virtual absl::StatusOr<DeviceBuffer> AdoptStaging(void* data, size_t bytes);
  virtual size_t allocated_bytes() const = 0;  // device memory; thread-safe

  // Copies host memory to the device, ordered after earlier ops; `src` may be reused on return.
  // Thread-safe for destinations that no op touches, but not beside Repeat.
  virtual absl::Status Upload(void* dst, const void* src, size_t bytes) = 0;
  // Copies device memory to the host after all earlier ops; blocks.
  virtual absl::Status Download(void* dst, const void* src, size_t bytes) = 0;
  // Starts a copy of what earlier ops leave in `src` to `dst`, host memory of AllocateStaging,
  // beside the ops that follow; those must not write `src`. FinishDownloads waits for all such
  // copies, and for no op behind the last of them.
  virtual absl::Status StartDownload(void* dst, const void* src, size_t bytes) = 0;
  virtual absl::Status FinishDownloads() = 0;
  // Packs KV that earlier ops have completed (Synchronize, or ElapsedUs to a mark behind them, has
  // returned since) into host memory from AllocateStaging; returns when the bytes are there.
  // Thread-safe: it runs beside ops, on a stream of its own.
  virtual absl::Status PackKv(const kernels::PackKvParams& params) = 0;
  // Packs whole blocks of KV in the compute dtype that lies in host memory: token t of a head is
  // row t % page_tokens of page pages[t / page_tokens], and k and v of `params` are page 0 of head
  // 0. It runs on the calling thread and asks nothing of the device. Thread-safe.
  void PackHostKv(const kernels::PackKvParams& params, absl::Span<const int> pages,
                  int page_tokens) const;
  // Waits for all earlier ops.
  virtual absl::Status Synchronize() = 0;

  // Marks the point behind all earlier ops, without waiting for it. Marks are numbered
  // 0 .. kNumMarks - 1 and may be set anew. ElapsedUs waits until the device has passed both points
  // and returns the time between them by the device's own clock; both must have been marked.
  static constexpr int kNumMarks = 136;
  virtual absl::Status Mark(int mark) = 0;
  virtual absl::StatusOr<double> ElapsedUs(int from, int to) = 0;

  // Runs `ops`, or replays them if this key was recorded. Where traits().records is set, the ops of
  // a key that comes again may be recorded, Mark included. For one key, `ops` must always enqueue
  // the same work over the same memory, must not wait for the device, and must have no side effect
  // on the host that matters, because a replay does not call it.
  using RecordingKey = std::array<int64_t, 4>;
  virtual absl::Status Repeat(const RecordingKey& key, absl::FunctionRef<absl::Status()> ops);
  virtual int64_t num_recordings() const { return 0; }  // held now; thread-safe

 protected:
  friend class DeviceBuffer;
  virtual void Free(MemoryKind kind, void* data, size_t bytes) = 0;  // thread-safe
};

enum class DeviceChoice { kAuto, kCpu, kCuda };

// kAuto takes the first CUDA device there is, else the CPU, and logs which and why. kCuda fails
// with FAILED_PRECONDITION when the build or the machine has none. cpu_threads 0 means all cores.
absl::StatusOr<std::unique_ptr<Device>> CreateDevice(DeviceChoice choice, int cpu_threads);

// Creates the device over kernels/cpu: fp32 in ordinary memory. Every op is done when it returns.
// num_threads 0 means all cores; INVALID_ARGUMENT when it is negative.
absl::StatusOr<std::unique_ptr<Device>> CreateCpuDevice(int num_threads);

// Creates the device over kernels/cuda: bf16 on the first visible GPU (CUDA_VISIBLE_DEVICES
// chooses). FAILED_PRECONDITION, with the driver's reason, when there is none or it is older than
// compute capability 8.0, and in a build without CUDA.
//
// Ops run on one stream, and PackKv on streams of its own. An error of the device itself (a fault
// in a kernel, a lost GPU) is UNAVAILABLE and cannot be recovered: every later call returns the
// same error.
absl::StatusOr<std::unique_ptr<Device>> CreateCudaDevice();

}  // namespace prefilld::model

#endif  // PREFILLD_MODEL_DEVICE_DEVICE_H_
