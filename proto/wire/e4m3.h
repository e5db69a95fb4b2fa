// The numbers of DTYPE_FP8_E4M3.
#ifndef PREFILLD_PROTO_WIRE_E4M3_H_
#define PREFILLD_PROTO_WIRE_E4M3_H_

#include <array>
#include <cstdint>
#include <limits>

namespace prefilld::wire {

// Returns what a byte stands for before its scale: a sign, 4 bits of exponent with bias 7, 3 of
// mantissa. The largest number is 448, and 0x7f and 0xff are NaN.
constexpr float E4m3Value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) return std::numeric_limits<float>::quiet_NaN();
  // The numbers are multiples of 2^-9, the step of the smallest ones.
  const int units = exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);
  const float magnitude = static_cast<float>(units) / 512.0f;
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

// E4m3Value of every byte.
inline constexpr std::array<float, 256> kE4m3Values = [] {
  std::array<float, 256> values = {};
  for (int bits = 0; bits < 256; ++bits) values[bits] = E4m3Value(static_cast<uint8_t>(bits));
  return values;
}();

}  // namespace prefilld::wire

#endif  // PREFILLD_PROTO_WIRE_E4M3_H_
