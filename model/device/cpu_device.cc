#include "model/device/device.h"

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/ops.h"
#include "kernels/cpu/threads.h"

namespace prefilld::model {
namespace {

namespace cpu = kernels::cpu;

// This is a cache line, and the width of the widest vector.
constexpr size_t kAlignment = 64;

class CpuOps final : public Ops {
 public:
  explicit CpuOps(int num_threads) : num_threads_(num_threads) {}

  absl::Status Embedding(const kernels::EmbeddingParams& p) override {
    return Run(cpu::Embedding, p);
  }
  absl::Status RmsNorm(const kernels::RmsNormParams& p) override { return Run(cpu::RmsNorm, p); }
  absl::Status Linear(const kernels::LinearParams& p) override { return Run(cpu::Linear, p); }
  absl::Status QkvRope(const kernels::QkvRopeParams& p) override { return Run(cpu::QkvRope, p); }
  absl::Status GatedLinear(const kernels::GatedLinearParams& p) override {
    return Run(cpu::GatedLinear, p);
  }
  absl::Status TokenLogprobs(const kernels::TokenLogprobsParams& p) override {
    return Run(cpu::TokenLogprobs, p);
  }
  absl::Status Attention(const kernels::AttentionParams& p) override {
    return Run(cpu::Attention, p);
  }
  absl::Status PagedAttention(const kernels::PagedAttentionParams& p) override {
    return Run(cpu::PagedAttention, p);
  }
  absl::Status Estimate(const kernels::EstimateParams& p) override { return Run(cpu::Estimate, p); }
  absl::Status AntidiagonalScores(const kernels::AntidiagonalScoresParams& p) override {
    return Run(cpu::AntidiagonalScores, p);
  }
  absl::Status VerticalSlash(const kernels::VerticalSlashParams& p) override {
    return Run(cpu::VerticalSlash, p);
  }
  absl::Status ExpandVerticalSlash(const kernels::ExpandVerticalSlashParams& p) override {
    return Run(cpu::ExpandVerticalSlash, p);
  }
  absl::Status SelectRows(const kernels::SelectRowsParams& p) override {
    return Run(cpu::SelectRows, p);
  }
  absl::Status PooledMass(const kernels::PooledMassParams& p) override {
    return Run(cpu::PooledMass, p);
  }
  absl::Status MeasurePattern(const kernels::MeasurePatternParams& p) override {
    return Run(cpu::MeasurePattern, p);
  }

 private:
  // Sets the number of OpenMP threads at each call, because it belongs to the calling thread, which
  // may be another one each time.
  template <typename Params>
  absl::Status Run(void (*op)(const Params&), const Params& params) {
    cpu::UseThreads(num_threads_);
    try {
      op(params);
    } catch (const std::bad_alloc&) {
      return absl::ResourceExhaustedError("host memory: scratch of an op refused");
    }
    return absl::OkStatus();
  }

  const int num_threads_;
};

// Every copy is done when its start returns.
class CpuCopies final : public HostCopies {
 public:
  absl::Status StartLoads(absl::Span<const RowCopy> copies) override {
    const auto started = std::chrono::steady_clock::now();
    for (const RowCopy& copy : copies) CopyRows(copy);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - started;
    load_seconds_.store(load_seconds_.load() + took.count());
    return absl::OkStatus();
  }
  absl::Status OrderOpsBehindLoads() override { return absl::OkStatus(); }
  absl::Status FinishLoads() override { return absl::OkStatus(); }
  absl::Status StartSaves(absl::Span<const RowCopy> copies) override {
    for (const RowCopy& copy : copies) CopyRows(copy);
    return absl::OkStatus();
  }
  absl::Status FinishSaves() override { return absl::OkStatus(); }
  double load_seconds() const override { return load_seconds_.load(); }

 private:
  static void CopyRows(const RowCopy& copy) {
    for (size_t row = 0; row < copy.rows; ++row) {
      std::memcpy(static_cast<char*>(copy.dst) + row * copy.dst_stride,
                  static_cast<const char*>(copy.src) + row * copy.src_stride, copy.row_bytes);
    }
  }

  std::atomic<double> load_seconds_{0.0};
};

class CpuDevice final : public Device {
 public:
  explicit CpuDevice(int num_threads)
      : traits_{.name = "cpu",
                .compute_dtype = kernels::DType::kFp32,
                .parallel_tiles = num_threads},
        ops_(num_threads) {}

  const DeviceTraits& traits() const override { return traits_; }
  Ops& ops() override { return ops_; }
  HostCopies& host_copies() override { return copies_; }
  size_t allocated_bytes() const override { return allocated_bytes_.load(); }

  absl::StatusOr<DeviceBuffer> Allocate(size_t bytes) override {
    return AllocateKind(MemoryKind::kDevice, bytes);
  }
  absl::StatusOr<DeviceBuffer> AllocateStaging(size_t bytes) override {
    return AllocateKind(MemoryKind::kStaging, bytes);
  }

  absl::Status Upload(void* dst, const void* src, size_t bytes) override {
    return Copy(dst, src, bytes);
  }
  absl::Status Download(void* dst, const void* src, size_t bytes) override {
    return Copy(dst, src, bytes);
  }
  absl::Status StartDownload(void* dst, const void* src, size_t bytes) override {
    return Copy(dst, src, bytes);
  }
  absl::Status FinishDownloads() override { return absl::OkStatus(); }
  absl::Status Synchronize() override { return absl::OkStatus(); }
  absl::Status Mark(int mark) override {
    marks_[mark] = std::chrono::steady_clock::now();
    return absl::OkStatus();
  }
  absl::StatusOr<double> ElapsedUs(int from, int to) override {
    return std::chrono::duration<double, std::micro>(marks_[to] - marks_[from]).count();
  }

  // Runs on the calling thread, beside the ops.
  absl::Status PackKv(const kernels::PackKvParams& p) override {
    cpu::PackKv(p);
    return absl::OkStatus();
  }

 protected:
  void Free(MemoryKind, void* data, size_t bytes) override {
    std::free(data);
    allocated_bytes_ -= bytes;
  }

 private:
  absl::StatusOr<DeviceBuffer> AllocateKind(MemoryKind kind, size_t bytes) {
    const size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* data = rounded >= bytes ? std::aligned_alloc(kAlignment, rounded) : nullptr;
    if (data == nullptr && bytes > 0) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "host memory: ", bytes, " bytes refused beside ", allocated_bytes(), " allocated"));
    }
    allocated_bytes_ += bytes;
    return DeviceBuffer(this, kind, data, bytes);
  }

  static absl::Status Copy(void* dst, const void* src, size_t bytes) {
    if (bytes > 0) std::memcpy(dst, src, bytes);
    return absl::OkStatus();
  }

  const DeviceTraits traits_;
  CpuOps ops_;
  CpuCopies copies_;
  std::array<std::chrono::steady_clock::time_point, kNumMarks> marks_;
  std::atomic<size_t> allocated_bytes_ = 0;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Device>> CreateCpuDevice(int num_threads) {
  if (num_threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("cpu_threads ", num_threads, " is negative; 0 means all cores"));
  }
  return std::make_unique<CpuDevice>(num_threads > 0 ? num_threads : cpu::AvailableThreads());
}

}  // namespace prefilld::model
