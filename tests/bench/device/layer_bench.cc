#include <algorithm>
#include <random>
#include <tuple>

#include "absl/strings/str_format.h"
#include "tests/bench/device/benches.h"

namespace prefilld::bench {
namespace {

// Makes random normal values in bf16 or fp32. Constants would run faster than real data.
absl::StatusOr<model::DeviceBuffer> Random(model::Device& device, int64_t size, float scale) {
  const size_t element = kernels::SizeOf(device.traits().compute_dtype);
  absl::StatusOr<model::DeviceBuffer> buffer = device.Allocate(size * element);
  if (!buffer.ok()) return buffer.status();
  std::mt19937 generator(static_cast<uint32_t>(size));
  std::normal_distribution<float> normal(0.0f, scale);
  const int64_t period = std::min<int64_t>(size, (1 << 20) + 7);
  std::vector<uint8_t> values(period * element);
  for (int64_t i = 0; i < period; ++i) {
    const float value = normal(generator);
    // bf16 is the upper half of fp32.
    const auto* bytes = reinterpret_cast<const uint8_t*>(&value) + sizeof(float) - element;
    std::copy_n(bytes, element, &values[i * element]);
  }
  for (int64_t first = 0; first < size; first += period) {
    absl::Status status = device.Upload(buffer->as<char>() + first * element, values.data(),
                                        std::min(period, size - first) * element);
    if (!status.ok()) return status;
  }
  return buffer;
}

// The clock falls while the card warms up, so the contenders take turns.
constexpr int kLinearsTurns = 5;
constexpr int kGatedRepetitions = 10;

// Measures gate, up and SwiGLU of one tile in two ways: as cuBLASLt's product followed by SwiGLU,
// and as tuning found fastest.
absl::Status BenchGatedLinear(model::Device& untuned, model::Device& tuned,
                              const kernels::GatedLinearParams& params, Report* report) {
  if (absl::Status status = tuned.ops().TuneGatedLinear(params); !status.ok()) return status;
  const auto repeat = [&params](model::Device& device) {
    absl::Status status;
    for (int i = 0; i < kGatedRepetitions && status.ok(); ++i) {
      status = device.ops().GatedLinear(params);
    }
    return status;
  };
  Row rows[] = {{.what = "gate, up and SwiGLU"}, {.what = "gate, up and SwiGLU, tuned"}};
  for (Row& row : rows) {
    row.shape = absl::StrFormat("%d x %d tokens", kGatedRepetitions, params.num_tokens);
    row.tflop = 4.0 * kGatedRepetitions * static_cast<double>(params.num_tokens) *
                static_cast<double>(params.in_features * params.intermediate) / 1e12;
  }
  const auto repeat_untuned = [&] { return repeat(untuned); };
  const auto repeat_tuned = [&] { return repeat(tuned); };
  const absl::Status status = MeasureInTurns(
      kLinearsTurns, {{untuned, repeat_untuned, &rows[0]}, {tuned, repeat_tuned, &rows[1]}});
  if (!status.ok()) return status;
  rows[1].more = {{"speedup", rows[0].median_ms / rows[1].median_ms}};
  for (Row& row : rows) report->Add(std::move(row));
  return absl::OkStatus();
}

}  // namespace

absl::Status BenchLayerOps(model::Device& device, const LayerShape& shape, int64_t num_tokens,
                           int runs, Report* report) {
  const int64_t q_width = int64_t{shape.num_heads} * shape.head_dim;
  const int64_t kv_width = int64_t{shape.num_kv_heads} * shape.head_dim;
  const int64_t qkv_width = q_width + 2 * kv_width;
  const int64_t wide = std::max(qkv_width, 2 * shape.intermediate);
  const double element = static_cast<double>(kernels::SizeOf(device.traits().compute_dtype));
  model::DeviceBuffer hidden, normed, wide_x, gated, q, k, v, weight, bias, inv_freq;
  const struct {
    model::DeviceBuffer& buffer;
    int64_t size;
    float scale;
  } tensors[] = {{hidden, num_tokens * shape.hidden, 1.0f},
                 {normed, num_tokens * shape.hidden, 1.0f},
                 {wide_x, num_tokens * wide, 1.0f},
                 {gated, num_tokens * shape.intermediate, 1.0f},
                 {q, num_tokens * q_width, 1.0f},
                 {k, num_tokens * kv_width, 1.0f},
                 {v, num_tokens * kv_width, 1.0f},
                 {weight, wide * shape.hidden, 0.02f},
                 {bias, wide, 0.02f}};
  for (const auto& [buffer, size, scale] : tensors) {
    absl::StatusOr<model::DeviceBuffer> filled = Random(device, size, scale);
    if (!filled.ok()) return filled.status();
    buffer = *std::move(filled);
  }
  std::vector<float> frequencies(shape.head_dim / 2, 0.01f);
  absl::StatusOr<model::DeviceBuffer> table = device.Allocate(frequencies.size() * sizeof(float));
  if (!table.ok()) return table.status();
  inv_freq = *std::move(table);
  absl::Status status = device.Upload(inv_freq.data(), frequencies.data(), inv_freq.bytes());
  if (!status.ok()) return status;

  const std::string name = absl::StrFormat("%d tokens %d wide", num_tokens, shape.hidden);
  const auto bench = [&](const char* what, double gflop, double elements,
                         absl::FunctionRef<absl::Status()> op) {
    Row row{.what = what, .shape = name};
    row.tflop = gflop / 1e3;
    row.gbytes = gflop > 0 ? 0.0 : elements * element / 1e9;
    absl::Status measured = Measure(device, runs, op, &row);
    if (measured.ok()) report->Add(std::move(row));
    return measured;
  };
  const auto linear = [&](const char* what, const void* x, void* y, int64_t in, int64_t out,
                          bool with_bias, bool accumulate) {
    const double gflop =
        2.0 * static_cast<double>(num_tokens * in) * static_cast<double>(out) / 1e9;
    return bench(what, gflop, 0, [&] {
      return device.ops().Linear({.x = x,
                                  .w = weight.data(),
                                  .bias = with_bias ? bias.data() : nullptr,
                                  .y = y,
                                  .num_tokens = num_tokens,
                                  .in_features = in,
                                  .out_features = out,
                                  .accumulate = accumulate});
    });
  };
  const auto tokens = static_cast<double>(num_tokens);
  status = bench("RMSNorm", 0, 2.0 * tokens * static_cast<double>(shape.hidden), [&] {
    return device.ops().RmsNorm({.x = hidden.data(),
                                 .weight = bias.data(),
                                 .y = normed.data(),
                                 .num_tokens = num_tokens,
                                 .hidden = shape.hidden});
  });
  if (status.ok()) {
    status = linear("linear qkv, bias", normed.data(), wide_x.data(), shape.hidden, qkv_width, true,
                    false);
  }
  if (status.ok()) {
    status = bench("RoPE, split to q, k, v", 0, 2.0 * tokens * static_cast<double>(qkv_width), [&] {
      return device.ops().QkvRope({.qkv = wide_x.data(),
                                   .inv_freq = inv_freq.as<float>(),
                                   .q = q.data(),
                                   .k = k.data(),
                                   .v = v.data(),
                                   .num_tokens = num_tokens,
                                   .kv_head_stride = num_tokens * shape.head_dim,
                                   .kv_token_stride = shape.head_dim,
                                   .num_heads = shape.num_heads,
                                   .num_kv_heads = shape.num_kv_heads,
                                   .head_dim = shape.head_dim});
    });
  }
  if (status.ok()) {
    status = linear("linear output, residual", q.data(), hidden.data(), q_width, shape.hidden,
                    false, true);
  }
  if (status.ok()) {
    status = linear("linear gate and up", normed.data(), wide_x.data(), shape.hidden,
                    2 * shape.intermediate, false, false);
  }
  if (status.ok()) {
    const double gflop =
        4e-9 * tokens * static_cast<double>(shape.hidden) * static_cast<double>(shape.intermediate);
    status = bench("gate, up and SwiGLU", gflop, 0, [&] {
      return device.ops().GatedLinear({.x = normed.data(),
                                       .w = weight.data(),
                                       .gate_up = wide_x.data(),
                                       .y = gated.data(),
                                       .num_tokens = num_tokens,
                                       .in_features = shape.hidden,
                                       .intermediate = shape.intermediate});
    });
  }
  if (status.ok()) {
    status = linear("linear down, residual", gated.data(), hidden.data(), shape.intermediate,
                    shape.hidden, false, true);
  }
  return status;
}

absl::Status BenchLinears(model::Device& device, model::Device& tuned, const LayerShape& shape,
                          int num_layers, int64_t num_tokens, int64_t tile_tokens, Report* report) {
  const int64_t q_width = int64_t{shape.num_heads} * shape.head_dim;
  const int64_t qkv_width = q_width + 2 * int64_t{shape.num_kv_heads} * shape.head_dim;
  struct Product {
    int64_t in, out;
    bool accumulate;
    model::DeviceBuffer x, w, y;
  };
  Product products[] = {{shape.hidden, qkv_width, false, {}, {}, {}},
                        {q_width, shape.hidden, true, {}, {}, {}},
                        {shape.hidden, 2 * shape.intermediate, false, {}, {}, {}},
                        {shape.intermediate, shape.hidden, true, {}, {}, {}}};
  double weights = 0.0;
  for (Product& product : products) {
    weights += static_cast<double>(product.in * product.out);
    const std::tuple<model::DeviceBuffer&, int64_t, float> tensors[] = {
        {product.x, tile_tokens * product.in, 1.0f},
        {product.w, product.out * product.in, 0.02f},
        {product.y, tile_tokens * product.out, 1.0f}};
    for (const auto& [buffer, size, scale] : tensors) {
      absl::StatusOr<model::DeviceBuffer> filled = Random(device, size, scale);
      if (!filled.ok()) return filled.status();
      buffer = *std::move(filled);
    }
  }
  const auto params = [](const Product& product, int64_t count) {
    return kernels::LinearParams{.x = product.x.data(),
                                 .w = product.w.data(),
                                 .y = product.y.data(),
                                 .num_tokens = count,
                                 .in_features = product.in,
                                 .out_features = product.out,
                                 .accumulate = product.accumulate};
  };
  const auto run = [&](model::Device& by, int layers) {
    absl::Status status;
    for (int layer = 0; layer < layers; ++layer) {
      for (const Product& product : products) {
        for (int64_t first = 0; first < num_tokens && status.ok(); first += tile_tokens) {
          status = by.ops().Linear(params(product, std::min(tile_tokens, num_tokens - first)));
        }
      }
    }
    return status;
  };
  absl::Status status = run(device, 1);
  if (status.ok()) status = device.Synchronize();
  for (const Product& product : products) {
    if (status.ok()) status = tuned.ops().TuneLinear(params(product, tile_tokens));
  }
  if (!status.ok()) return status;
  Row rows[] = {{.what = "all linears of a prefill"}, {.what = "the same, tuned"}};
  for (Row& row : rows) {
    row.shape = absl::StrFormat("%d tokens, %d layers", num_tokens, num_layers);
    row.tflop = 2.0 * weights * num_layers * static_cast<double>(num_tokens) / 1e12;
  }
  const auto run_untuned = [&] { return run(device, num_layers); };
  const auto run_tuned = [&] { return run(tuned, num_layers); };
  status = MeasureInTurns(kLinearsTurns,
                          {{device, run_untuned, &rows[0]}, {tuned, run_tuned, &rows[1]}});
  if (!status.ok()) return status;
  for (Row& row : rows) report->Add(std::move(row));
  const Product& gate_up = products[2];
  return BenchGatedLinear(device, tuned,
                          {.x = gate_up.x.data(),
                           .w = gate_up.w.data(),
                           .gate_up = gate_up.y.data(),
                           .y = products[3].x.data(),
                           .num_tokens = tile_tokens,
                           .in_features = gate_up.in,
                           .intermediate = shape.intermediate},
                          report);
}

}  // namespace prefilld::bench
