#include "tests/bench/device/attention_check.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "kernels/dtype.h"

namespace prefilld::bench {
namespace {

constexpr int kBlock = 128;
constexpr int64_t kQueries = 4;
// P and the output are rounded to bf16, with an error of 2^-9 each at most.
constexpr double kBf16Tolerance = 1e-2;
constexpr double kFp32Tolerance = 1e-4;

absl::StatusOr<std::vector<float>> DownloadAsFloat(model::Device& device, const void* from,
                                                   int64_t elements) {
  std::vector<float> values(static_cast<size_t>(elements));
  if (device.traits().compute_dtype == kernels::DType::kFp32) {
    absl::Status status = device.Download(values.data(), from, values.size() * sizeof(float));
    if (!status.ok()) return status;
    return values;
  }
  std::vector<uint16_t> bf16(values.size());
  absl::Status status = device.Download(bf16.data(), from, bf16.size() * sizeof(uint16_t));
  if (!status.ok()) return status;
  for (size_t i = 0; i < bf16.size(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(bf16[i]) << 16;
    std::memcpy(&values[i], &bits, sizeof(bits));
  }
  return values;
}

}  // namespace

absl::StatusOr<AttentionCheck> AttentionCheck::Create(model::Device* device,
                                                      const AttentionData* data) {
  AttentionCheck check(device, data);
  const int64_t elements = data->num_kv_heads * data->num_tokens * data->head_dim;
  for (const auto& [from, to] : {std::pair(&data->k, &check.k_), std::pair(&data->v, &check.v_)}) {
    absl::StatusOr<std::vector<float>> values = DownloadAsFloat(*device, from->data(), elements);
    if (!values.ok()) return values.status();
    *to = *std::move(values);
  }
  return check;
}

absl::StatusOr<std::vector<float>> AttentionCheck::Row(const model::DeviceBuffer& rows,
                                                       int64_t query) const {
  const int64_t width = int64_t{data_.num_heads} * data_.head_dim;
  const auto element = static_cast<int64_t>(kernels::SizeOf(device_.traits().compute_dtype));
  return DownloadAsFloat(device_, rows.as<char>() + query * width * element, width);
}

std::vector<double> AttentionCheck::Expected(const float* q, int64_t query, int head,
                                             absl::Span<const uint32_t> patterns) const {
  const int64_t n = kernels::CeilDiv(data_.num_tokens, kBlock);
  const int64_t words = kernels::PatternWords(n);
  const int64_t row = query / kBlock;
  const int64_t kv_head = head / (data_.num_heads / data_.num_kv_heads);
  const int64_t first = kv_head * data_.num_tokens * data_.head_dim;
  const auto is_computed = [&](int64_t block) {
    if (patterns.empty() || block == row) return true;
    return (patterns[(head * n + row) * words + block / 32] >> (block % 32) & 1) != 0;
  };
  std::vector<double> sum(data_.head_dim, 0.0);
  double weights = 0.0, largest = -INFINITY;
  for (int64_t key = 0; key <= query; ++key) {
    if (!is_computed(key / kBlock)) continue;
    const float* k = &k_[first + key * data_.head_dim];
    const float* v = &v_[first + key * data_.head_dim];
    double logit = 0.0;
    for (int d = 0; d < data_.head_dim; ++d) logit += double{q[d]} * k[d];
    logit *= data_.Params().scale;
    if (logit > largest) {  // the sums so far are relative to the old maximum
      const double factor = std::exp(largest - logit);
      weights *= factor;
      for (double& s : sum) s *= factor;
      largest = logit;
    }
    const double weight = std::exp(logit - largest);
    weights += weight;
    for (int d = 0; d < data_.head_dim; ++d) sum[d] += weight * v[d];
  }
  for (double& s : sum) s /= weights;
  return sum;
}

absl::StatusOr<double> AttentionCheck::Error(absl::Span<const uint32_t> patterns) const {
  double error = 0.0, norm = 0.0;
  for (int64_t i = 1; i <= std::min(kQueries, data_.num_tokens); ++i) {
    const int64_t query = i * data_.num_tokens / std::min(kQueries, data_.num_tokens) - 1;
    const absl::StatusOr<std::vector<float>> q = Row(data_.q, query);
    if (!q.ok()) return q.status();
    const absl::StatusOr<std::vector<float>> out = Row(data_.out, query);
    if (!out.ok()) return out.status();
    for (int head = 0; head < data_.num_heads; ++head) {
      const int64_t at = int64_t{head} * data_.head_dim;
      const std::vector<double> expected = Expected(&(*q)[at], query, head, patterns);
      for (int d = 0; d < data_.head_dim; ++d) {
        error += std::pow((*out)[at + d] - expected[d], 2);
        norm += std::pow(expected[d], 2);
      }
    }
  }
  const double relative = std::sqrt(error / norm);
  const bool is_fp32 = device_.traits().compute_dtype == kernels::DType::kFp32;
  const double tolerance = is_fp32 ? kFp32Tolerance : kBf16Tolerance;
  if (relative <= tolerance) return relative;  // false for NaN
  return absl::InternalError(absl::StrCat("the attention that was timed is wrong: relative error ",
                                          relative, ", at most ", tolerance));
}

}  // namespace prefilld::bench
