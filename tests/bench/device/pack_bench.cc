#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/kv_pack.h"
#include "tests/bench/device/benches.h"

namespace prefilld::bench {
namespace {

constexpr int64_t kFrameBytes = int64_t{2} << 20;

struct WireType {
  const char* name;
  kernels::DType dtype;
  kernels::KvScales scales;
};

constexpr WireType kWireTypes[] = {
    {"bf16", kernels::DType::kBf16, kernels::KvScales::kNone},
    {"fp16", kernels::DType::kFp16, kernels::KvScales::kNone},
    {"fp32", kernels::DType::kFp32, kernels::KvScales::kNone},
    {"fp8, a scale for each token", kernels::DType::kBf16, kernels::KvScales::kPerToken},
    {"fp8, a scale for each block", kernels::DType::kBf16, kernels::KvScales::kPerBlock}};

// Packs a layer's KV frame by frame, as the server's packing threads do: each into a staging buffer
// of its own. Returns the seconds it took.
absl::StatusOr<double> PackLayer(model::Device& device, const kernels::PackKvParams& layer,
                                 std::vector<model::DeviceBuffer>& buffers) {
  kernels::PackKvParams one_block = layer;
  one_block.num_blocks = 1;
  const int64_t frame_blocks = kFrameBytes / kernels::PackedBytes(one_block);
  if (frame_blocks == 0) return absl::InvalidArgumentError("a block has more bytes than a frame");
  std::atomic<int64_t> next_block = 0;
  std::vector<absl::Status> statuses(buffers.size());
  const auto begin = std::chrono::steady_clock::now();
  std::vector<std::thread> threads;
  for (size_t i = 0; i < buffers.size(); ++i) {
    threads.emplace_back([&, i] {
      while (statuses[i].ok()) {
        kernels::PackKvParams frame = layer;
        frame.first_block = next_block.fetch_add(frame_blocks);
        if (frame.first_block >= layer.num_blocks) return;
        frame.num_blocks = std::min(frame_blocks, layer.num_blocks - frame.first_block);
        frame.dst = buffers[i].data();
        statuses[i] = device.PackKv(frame);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const absl::Status& status : statuses) {
    if (!status.ok()) return status;
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

}  // namespace

absl::Status BenchPack(model::Device& device, const AttentionData& data,
                       const std::vector<int64_t>& threads, int runs, Report* report) {
  kernels::PackKvParams layer;
  layer.k = data.k.data();
  layer.v = data.v.data();
  layer.kv_head_stride = data.num_tokens * data.head_dim;
  layer.num_tokens = data.num_tokens;
  layer.num_blocks = (data.num_tokens + layer.block_tokens - 1) / layer.block_tokens;
  layer.num_heads = data.num_kv_heads;
  layer.head_dim = data.head_dim;
  layer.src_dtype = device.traits().compute_dtype;
  const double elements =
      2.0 * static_cast<double>(data.num_tokens) * data.num_kv_heads * data.head_dim;
  for (const bool beside_attention : {false, true}) {
    for (const WireType& type : kWireTypes) {
      layer.dst_dtype = type.dtype;
      layer.scales = type.scales;
      for (const int64_t count : threads) {
        std::vector<model::DeviceBuffer> buffers;
        for (int64_t i = 0; i < count; ++i) {
          absl::StatusOr<model::DeviceBuffer> buffer = device.AllocateStaging(kFrameBytes);
          if (!buffer.ok()) return buffer.status();
          buffers.push_back(*std::move(buffer));
        }
        std::vector<double> ms;
        for (int run = -1; run < runs; ++run) {  // the first warms up
          absl::Status status = device.Synchronize();
          if (status.ok() && beside_attention) status = device.ops().Attention(data.Params());
          if (!status.ok()) return status;
          absl::StatusOr<double> seconds = PackLayer(device, layer, buffers);
          if (!seconds.ok()) return seconds.status();
          if (run >= 0) ms.push_back(1e3 * *seconds);
        }
        if (absl::Status status = device.Synchronize(); !status.ok()) return status;
        std::sort(ms.begin(), ms.end());
        report->Add(
            {.what = absl::StrCat("pack KV as ", type.name),
             .shape = absl::StrCat(count, " threads", beside_attention ? ", beside attention" : ""),
             .median_ms = ms[ms.size() / 2],
             .min_ms = ms.front(),
             .max_ms = ms.back(),
             .gbytes = 1e-9 * static_cast<double>(kernels::PackedBytes(layer)),
             .more = {{"1e9 elements/s", 1e-6 * elements / ms[ms.size() / 2]}}});
      }
    }
  }
  return absl::OkStatus();
}

}  // namespace prefilld::bench
