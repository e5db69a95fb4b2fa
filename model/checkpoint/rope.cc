#include <algorithm>
#include <cmath>
#include <cstddef>
#include <vector>

#include "model/checkpoint/config.h"

// Frequencies are computed in fp32 where transformers does (modeling_rope_utils), because models
// were trained with those. An exponent or a base that differs in the last bit causes errors of
// radians at long positions.

namespace prefilld::model {
namespace {

constexpr double kPi = 3.14159265358979323846;

// Returns base^(2i / head_dim), correctly rounded: the positions in which pair i turns by one
// radian.
std::vector<float> PositionsPerRadian(double base, int head_dim) {
  std::vector<float> lengths(static_cast<size_t>(head_dim / 2));
  for (size_t i = 0; i < lengths.size(); ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    lengths[i] = static_cast<float>(std::pow(base, static_cast<double>(exponent)));
  }
  return lengths;
}

std::vector<float> InverseFrequencies(double base, int head_dim) {
  std::vector<float> inv_freq = PositionsPerRadian(base, head_dim);
  for (float& f : inv_freq) f = 1.0f / f;
  return inv_freq;
}

// Returns a base that lets the longest wavelength grow with the prompt while the shortest stays.
double DynamicNtkBase(const RopeConfig& rope, int head_dim, int64_t num_tokens) {
  const double original = static_cast<double>(rope.original_max_positions);
  const double length = std::max(static_cast<double>(num_tokens), original);
  const double stretch = rope.factor * length / original - (rope.factor - 1.0);
  return rope.theta * std::pow(stretch, head_dim / (head_dim - 2.0));
}

// Stretches long wavelengths by the factor, keeps short ones, and blends those between.
void StretchLlama3(const RopeConfig& rope, std::vector<float>& inv_freq) {
  const auto original = static_cast<float>(rope.original_max_positions);
  const auto factor = static_cast<float>(rope.factor);
  const auto low = static_cast<float>(rope.low_freq_factor);
  const auto high = static_cast<float>(rope.high_freq_factor);
  for (float& f : inv_freq) {
    const float wavelength = static_cast<float>(2.0 * kPi) / f;
    if (wavelength < original / high) continue;
    if (wavelength > original / low) {
      f /= factor;
      continue;
    }
    const float kept = (original / wavelength - low) / (high - low);
    f = (1.0f - kept) * f / factor + kept * f;
  }
}

// Returns, as a real number, the pair of dimensions that turns `rotations` times over the original
// length.
double YarnDimension(const RopeConfig& rope, int head_dim, double rotations) {
  const double original = static_cast<double>(rope.original_max_positions);
  return head_dim * std::log(original / (rotations * 2.0 * kPi)) / (2.0 * std::log(rope.theta));
}

std::vector<float> YarnInverseFrequencies(const RopeConfig& rope, int head_dim) {
  double low = YarnDimension(rope, head_dim, rope.beta_fast);
  double high = YarnDimension(rope, head_dim, rope.beta_slow);
  if (rope.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, head_dim - 1.0);
  if (low == high) high += 0.001;  // a step instead of a ramp

  std::vector<float> inv_freq = PositionsPerRadian(rope.theta, head_dim);
  for (size_t i = 0; i < inv_freq.size(); ++i) {
    const float ramp =
        (static_cast<float>(i) - static_cast<float>(low)) / static_cast<float>(high - low);
    const float kept = 1.0f - std::clamp(ramp, 0.0f, 1.0f);
    const float length = inv_freq[i];
    const float stretched_length = static_cast<float>(rope.factor) * length;
    inv_freq[i] = 1.0f / stretched_length * (1.0f - kept) + 1.0f / length * kept;
  }
  return inv_freq;
}

// Returns a factor that sharpens attention in proportion to the logarithm of the stretch.
double YarnScale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

double YarnAttentionFactor(const RopeConfig& rope) {
  if (rope.attention_factor != 0.0) return rope.attention_factor;
  if (rope.mscale != 0.0 && rope.mscale_all_dim != 0.0) {
    return YarnScale(rope.factor, rope.mscale) / YarnScale(rope.factor, rope.mscale_all_dim);
  }
  return YarnScale(rope.factor, 1.0);
}

}  // namespace

int64_t PositionLimit(const ModelConfig& config) {
  switch (config.rope.kind) {
    case RopeKind::kDefault:
    case RopeKind::kLlama3:
      return config.max_positions;
    case RopeKind::kLinear:
      return static_cast<int64_t>(static_cast<double>(config.max_positions) * config.rope.factor);
    case RopeKind::kYarn:
      return std::max(config.max_positions,
                      static_cast<int64_t>(static_cast<double>(config.rope.original_max_positions) *
                                           config.rope.factor));
    case RopeKind::kDynamicNtk:
      return INT64_MAX;  // stretches with the prompt
  }
  return config.max_positions;
}

bool HasCommonRopeTable(const ModelConfig& config, int64_t num_tokens) {
  return config.rope.kind != RopeKind::kDynamicNtk ||
         num_tokens <= config.rope.original_max_positions;
}

RopeTable MakeRopeTable(const ModelConfig& config, int64_t num_tokens) {
  const RopeConfig& rope = config.rope;
  RopeTable table;
  switch (rope.kind) {
    case RopeKind::kDefault:
      table.inv_freq = InverseFrequencies(rope.theta, config.head_dim);
      break;
    case RopeKind::kLinear:
      table.inv_freq = InverseFrequencies(rope.theta, config.head_dim);
      for (float& f : table.inv_freq) f /= static_cast<float>(rope.factor);
      break;
    case RopeKind::kDynamicNtk:
      table.inv_freq =
          InverseFrequencies(DynamicNtkBase(rope, config.head_dim, num_tokens), config.head_dim);
      break;
    case RopeKind::kLlama3:
      table.inv_freq = InverseFrequencies(rope.theta, config.head_dim);
      StretchLlama3(rope, table.inv_freq);
      break;
    case RopeKind::kYarn:
      table.inv_freq = YarnInverseFrequencies(rope, config.head_dim);
      table.attention_factor = static_cast<float>(YarnAttentionFactor(rope));
      break;
  }
  return table;
}

}  // namespace prefilld::model
