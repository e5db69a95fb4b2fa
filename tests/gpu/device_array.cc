#include "tests/gpu/device_array.h"

#include <bit>
#include <random>

#include "tests/kernels/reference_layer_ops.h"

namespace prefilld::kernels::testing {

std::vector<Bf16> ToBf16(const std::vector<float>& values) {
  std::vector<Bf16> bits(values.size());
  for (size_t i = 0; i < values.size(); ++i) bits[i] = reference::ToBf16(values[i]);
  return bits;
}

std::vector<float> FromBf16(const std::vector<Bf16>& values) {
  std::vector<float> floats(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    floats[i] = std::bit_cast<float>(static_cast<uint32_t>(values[i]) << 16);
  }
  return floats;
}

std::vector<float> RoundToBf16(const std::vector<float>& values) {
  return FromBf16(ToBf16(values));
}

std::vector<float> NormalValues(size_t count, float deviation, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, deviation);
  std::vector<float> values(count);
  for (float& x : values) x = normal(random);
  return RoundToBf16(values);
}

}  // namespace prefilld::kernels::testing
