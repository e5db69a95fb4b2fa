#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/antidiagonal_scores.h"
#include "tests/bench/device/benches.h"

namespace prefilld::bench {
namespace {

constexpr int kBlock = 128;
constexpr double kWorstSum = 1e-3;

// Returns how far from 1 the sum of a row of `mass`, of one head, [n, n], gets at most.
absl::StatusOr<double> WorstSum(model::Device& device, const float* mass, int64_t n) {
  std::vector<float> rows(static_cast<size_t>(n * n));
  absl::Status status = device.Download(rows.data(), mass, rows.size() * sizeof(float));
  if (!status.ok()) return status;
  double worst = 0.0;
  for (int64_t row = 0; row < n; ++row) {
    const float* begin = rows.data() + row * n;
    worst = std::max(worst, std::abs(std::accumulate(begin, begin + row + 1, 0.0) - 1.0));
  }
  // A NaN is worse than any number.
  if (!(worst <= kWorstSum)) {
    return absl::InternalError(absl::StrCat("a row of block mass is ", worst, " away from 1"));
  }
  return worst;
}

}  // namespace

absl::Status BenchScores(model::Device& device, const AttentionData& data, int stride, int runs,
                         Report* report) {
  const int64_t n = kernels::CeilDiv(data.num_tokens, kBlock);
  const int64_t head_mass = n * n;
  const int64_t head_words = n * kernels::PatternWords(n);
  absl::StatusOr<model::DeviceBuffer> mass =
      device.Allocate(static_cast<size_t>(data.num_heads * head_mass) * sizeof(float));
  if (!mass.ok()) return mass.status();
  absl::StatusOr<model::DeviceBuffer> patterns =
      device.Allocate(static_cast<size_t>(data.num_heads * head_words) * sizeof(uint32_t));
  if (!patterns.ok()) return patterns.status();
  std::vector<int> heads(static_cast<size_t>(data.num_heads));
  std::iota(heads.begin(), heads.end(), 0);

  const double tokens = static_cast<double>(data.num_tokens);
  const std::string shape = absl::StrFormat("%d tokens %d/%d d%d", data.num_tokens, data.num_heads,
                                            data.num_kv_heads, data.head_dim);
  Row scores{.what = absl::StrCat("antidiagonal scores, stride ", stride),
             .shape = shape,
             .tflop = data.num_heads * data.head_dim * tokens * tokens / stride / 1e12};
  const auto score = [&] {
    return device.ops().AntidiagonalScores(
        {.q = data.q.data(),
         .k = data.k.data(),
         .num_queries = data.num_tokens,
         .num_keys = data.num_tokens,
         .kv_head_stride = data.num_tokens * data.head_dim,
         .num_heads = data.num_heads,
         .num_kv_heads = data.num_kv_heads,
         .head_dim = data.head_dim,
         .block_tokens = kBlock,
         .stride = stride,
         .scale = 1.0f / std::sqrt(static_cast<float>(data.head_dim)),
         .heads = heads.data(),
         .num_scored = data.num_heads,
         .block_mass = mass->as<float>()});
  };
  Row choice{.what = "choice of blocks by scores", .shape = shape};
  const auto choose = [&] {
    return device.ops().SelectRows({.block_mass = mass->as<float>(),
                                    .num_query_blocks = n,
                                    .num_key_blocks = n,
                                    .gamma = 0.95f,
                                    .pattern = patterns->as<uint32_t>(),
                                    .num_heads = data.num_heads});
  };
  absl::Status status = MeasureInTurns(runs, {{device, score, &scores}, {device, choose, &choice}});
  if (!status.ok()) return status;
  const absl::StatusOr<double> worst =
      WorstSum(device, mass->as<float>() + (data.num_heads - 1) * head_mass, n);
  if (!worst.ok()) return worst.status();
  scores.more = {{"worst_sum", *worst}};
  report->Add(std::move(scores));
  report->Add(std::move(choice));
  return absl::OkStatus();
}

}  // namespace prefilld::bench
