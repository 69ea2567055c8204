// Vectors of floats by the vector types of GCC and Clang, as wide as the instruction set that the file is compiled for;
// in an unnamed namespace, as generic.h.
#pragma once

#include <cstdint>
#include <cstring>

namespace {

#if defined(__AVX__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif
typedef float Lanes __attribute__((vector_size(4 * kWidth)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kWidth)));

inline Lanes load_lanes(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}
// Stored values as floats.
template <class Stored>
inline Lanes load_lanes(const Stored* from) {
  typedef Stored Narrow __attribute__((vector_size(sizeof(Stored) * kWidth)));
  Narrow x;
  std::memcpy(&x, from, sizeof(x));
  if constexpr (sizeof(Stored) == 1)
    return __builtin_convertvector(__builtin_convertvector(x, IntLanes), Lanes);
  else  // bfloat16: the upper half of a float
    return Lanes(__builtin_convertvector(x, IntLanes) << 16);
}
inline void store_lanes(float* to, Lanes x) { std::memcpy(to, &x, sizeof(x)); }

inline Lanes choose(IntLanes condition, Lanes yes, Lanes no) {
  return Lanes((condition & IntLanes(yes)) | (~condition & IntLanes(no)));
}
inline Lanes largest_of(Lanes a, Lanes b) { return choose(a > b, a, b); }

// 2^x for x <= 0 with a relative error of 2e-7; 0 below -126, NaN stays NaN.
inline Lanes exp2_below_zero(Lanes x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum has no bits below one
  const IntLanes tiny = x < -126.0f;
  x = choose(tiny, Lanes{}, x);
  const Lanes whole = (x + kMagic) - kMagic;
  const Lanes rest = x - whole;  // -0.5 to 0.5: Taylor series of e^(rest * ln 2)
  Lanes y = Lanes{} + 1.5403530e-4f;
  y = y * rest + 1.3333558e-3f;
  y = y * rest + 9.6181291e-3f;
  y = y * rest + 5.5504109e-2f;
  y = y * rest + 2.4022651e-1f;
  y = y * rest + 6.9314718e-1f;
  y = y * rest + 1.0f;
  const IntLanes bits = IntLanes(x + kMagic) << 23;  // the integer is in the low bits
  return choose(tiny, Lanes{}, y * Lanes(bits + (127 << 23)));
}

inline float sum_of(Lanes x) {
  float lanes[kWidth];
  store_lanes(lanes, x);
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

}  // namespace
