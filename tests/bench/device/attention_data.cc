#include "tests/bench/device/attention_data.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/str_cat.h"
#include "model/checkpoint/safetensors.h"
#include "proto/status_macros.h"

namespace prefilld::bench {
namespace {

float Bf16ToFloat(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

uint16_t FloatToBf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// Makes a tensor in the compute dtype whose element i is value(i).
absl::StatusOr<model::DeviceBuffer> Fill(model::Device& device, int64_t size,
                                         absl::FunctionRef<float(int64_t)> value) {
  const bool wide = device.traits().compute_dtype == kernels::DType::kFp32;
  absl::StatusOr<model::DeviceBuffer> buffer =
      device.Allocate(size * kernels::SizeOf(device.traits().compute_dtype));
  if (!buffer.ok()) return buffer.status();
  std::vector<float> floats(wide ? size : 0);
  std::vector<uint16_t> halves(wide ? 0 : size);
  for (int64_t i = 0; i < size; ++i) {
    if (wide) {
      floats[i] = value(i);
    } else {
      halves[i] = FloatToBf16(value(i));
    }
  }
  const void* source = wide ? static_cast<const void*>(floats.data()) : halves.data();
  absl::Status status = device.Upload(buffer->data(), source, buffer->bytes());
  if (!status.ok()) return status;
  return buffer;
}

absl::StatusOr<AttentionData> Make(model::Device& device, AttentionData data,
                                   absl::FunctionRef<float(int64_t)> q,
                                   absl::FunctionRef<float(int64_t)> k,
                                   absl::FunctionRef<float(int64_t)> v) {
  const int64_t q_size = data.num_tokens * data.num_heads * data.head_dim;
  const int64_t kv_size = data.num_tokens * data.num_kv_heads * data.head_dim;
  const struct {
    model::DeviceBuffer& buffer;
    int64_t size;
    absl::FunctionRef<float(int64_t)> value;
  } tensors[] = {{data.q, q_size, q}, {data.k, kv_size, k}, {data.v, kv_size, v}};
  for (const auto& [buffer, size, value] : tensors) {
    absl::StatusOr<model::DeviceBuffer> filled = Fill(device, size, value);
    if (!filled.ok()) return filled.status();
    buffer = *std::move(filled);
  }
  absl::StatusOr<model::DeviceBuffer> out = device.Allocate(data.q.bytes());
  if (!out.ok()) return out.status();
  data.out = *std::move(out);
  return data;
}

absl::StatusOr<const model::Tensor*> FindBf16(const model::Checkpoint& file, const char* name) {
  PREFILLD_ASSIGN_OR_RETURN(const model::Tensor* tensor, file.Find(name));
  if (tensor->dtype != kernels::DType::kBf16 || tensor->shape.size() != 4 ||
      tensor->shape[0] != 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor ", name, " is not bf16 [1, tokens, heads, head_dim]"));
  }
  return tensor;
}

}  // namespace

kernels::AttentionParams AttentionData::Params() const {
  return {.q = q.data(),
          .k = k.data(),
          .v = v.data(),
          .out = out.data(),
          .num_queries = num_tokens,
          .num_keys = num_tokens,
          .kv_head_stride = num_tokens * head_dim,
          .num_heads = num_heads,
          .num_kv_heads = num_kv_heads,
          .head_dim = head_dim,
          .block_tokens = 128,
          .scale = 1.0f / std::sqrt(static_cast<float>(head_dim))};
}

absl::StatusOr<AttentionData> RandomAttentionData(model::Device& device, int64_t num_tokens,
                                                  int num_heads, int num_kv_heads, int head_dim) {
  AttentionData data;
  data.num_tokens = num_tokens;
  data.num_heads = num_heads;
  data.num_kv_heads = num_kv_heads;
  data.head_dim = head_dim;
  // The normal values repeat with a long period, so that filling gigabytes does not take minutes.
  std::mt19937 generator(1);
  std::normal_distribution<float> normal;
  std::vector<float> values((1 << 20) + 7);
  for (float& value : values) value = normal(generator);
  const auto at = [&](int64_t i) { return values[i % values.size()]; };
  return Make(
      device, std::move(data), at, [&](int64_t i) { return at(i + 12345); },
      [&](int64_t i) { return at(i + 54321); });
}

absl::StatusOr<AttentionData> LoadAttentionData(model::Device& device, const std::string& folder) {
  absl::StatusOr<std::unique_ptr<model::Checkpoint>> file = model::Checkpoint::Open(folder);
  if (!file.ok()) return file.status();
  const model::Tensor* tensors[3];
  const char* const names[3] = {"q", "k", "v"};
  for (int i = 0; i < 3; ++i) {
    absl::StatusOr<const model::Tensor*> tensor = FindBf16(**file, names[i]);
    if (!tensor.ok()) return tensor.status();
    tensors[i] = *tensor;
  }
  AttentionData data;
  data.num_tokens = tensors[0]->shape[1];
  data.num_heads = static_cast<int>(tensors[0]->shape[2]);
  data.head_dim = static_cast<int>(tensors[0]->shape[3]);
  data.num_kv_heads = static_cast<int>(tensors[1]->shape[2]);
  if (tensors[1]->shape != tensors[2]->shape || tensors[1]->shape[1] != data.num_tokens ||
      tensors[1]->shape[3] != data.head_dim || data.num_heads % data.num_kv_heads != 0) {
    return absl::InvalidArgumentError("shapes of q, k and v do not belong together");
  }
  const auto element = [](const model::Tensor* tensor, int64_t i) {
    uint16_t bits;  // memcpy, because the file's data may be at any address
    std::memcpy(&bits, tensor->data + static_cast<size_t>(i) * sizeof(bits), sizeof(bits));
    return Bf16ToFloat(bits);
  };
  // The file is token-major, and the device expects head-major.
  const int64_t d = data.head_dim, tokens = data.num_tokens, kv_heads = data.num_kv_heads;
  const auto head_major = [&](const model::Tensor* tensor, int64_t i) {
    const int64_t head = i / (tokens * d), token = i / d % tokens;
    return element(tensor, (token * kv_heads + head) * d + i % d);
  };
  return Make(
      device, std::move(data), [&](int64_t i) { return element(tensors[0], i); },
      [&](int64_t i) { return head_major(tensors[1], i); },
      [&](int64_t i) { return head_major(tensors[2], i); });
}

}  // namespace prefilld::bench
