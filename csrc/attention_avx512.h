// Shared by the AVX-512 attention kernels: exponentials, permutations and sums across registers.
#pragma once

// GCC 12 warns of lanes that its own intrinsics leave undefined on purpose.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>

#include <cstdint>

namespace {

// 2^x for x <= 0 with a relative error of 2e-7; 0 at -150 and below, NaN stays NaN.
inline __m512 exp2_below_zero(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);  // with a NaN, max returns the second operand
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_sub_ps(x, whole);  // -0.5 to 0.5: Taylor series of e^(rest * ln 2)
  __m512 y = _mm512_set1_ps(1.5403530e-4f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.3333558e-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(9.6181291e-3f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.5504109e-2f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.4022651e-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.9314718e-1f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, whole);
}

// Interleaves the two halves of a register, 16 values each.
inline __m512i interleave_halves(__m512i both) {
  alignas(64) static constexpr uint16_t order[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                     21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                     11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(order), both);
}

struct AddFloats {
  __m512 operator()(__m512 a, __m512 b) const { return _mm512_add_ps(a, b); }
};
struct AddIntegers {
  __m512 operator()(__m512 a, __m512 b) const {
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), _mm512_castps_si512(b)));
  }
};

// Lane j of the result is the sum of all lanes of r[j]: 30 shuffles for 16 sums; one by one they take 64.
template <class Add>
inline __m512 sum_each(const __m512 (&r)[16], Add add) {
  __m512 halves[8], quarters[4];
  for (int i = 0; i < 8; ++i) {
    const __m512 a = r[(i / 4) * 8 + i % 4], b = r[(i / 4) * 8 + i % 4 + 4];
    halves[i] = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
  }
  for (int i = 0; i < 4; ++i)
    quarters[i] = add(_mm512_shuffle_f32x4(halves[i], halves[i + 4], 0x88),
                      _mm512_shuffle_f32x4(halves[i], halves[i + 4], 0xdd));
  const __m512 even =
      add(_mm512_unpacklo_ps(quarters[0], quarters[2]), _mm512_unpackhi_ps(quarters[0], quarters[2]));
  const __m512 odd =
      add(_mm512_unpacklo_ps(quarters[1], quarters[3]), _mm512_unpackhi_ps(quarters[1], quarters[3]));
  return add(_mm512_unpacklo_ps(even, odd), _mm512_unpackhi_ps(even, odd));
}

}  // namespace
