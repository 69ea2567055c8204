// x86 with AVX2 and FMA: pairs of products are summed in 16 bits, pairs of those sums in 32.
#if defined(__x86_64__)
#include <immintrin.h>

#include "generic.h"
#include "steps.h"

namespace {

// Four inputs of 8 rows times four of a token. A stored weight of 4 bits is unsigned, at most 15, so that two products
// fit in 16 bits. Weights of 8 bits enter as magnitudes, their sign moved to the other factor.
template <int kBits>
inline __m256i products(__m256i w, __m256i x) {
  const __m256i ones = _mm256_set1_epi16(1);
  if constexpr (kBits == 4) return _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), ones);
  const __m256i q = _mm256_xor_si256(w, _mm256_set1_epi8(int8_t(0x80)));
  // |-128| * 127 twice would overflow 16 bits: -128 enters as -64 - 64.
  const __m256i half = _mm256_and_si256(_mm256_cmpeq_epi8(q, _mm256_set1_epi8(-128)), _mm256_set1_epi8(-64));
  const __m256i rest = _mm256_sub_epi8(q, half);
  const __m256i a = _mm256_maddubs_epi16(_mm256_abs_epi8(rest), _mm256_sign_epi8(x, rest));
  const __m256i b = _mm256_maddubs_epi16(_mm256_abs_epi8(half), _mm256_sign_epi8(x, half));
  return _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, ones));
}

template <int kBits, int kCount>
void block(const uint8_t* tiles, const int8_t* values, const float* scales, const int32_t* offsets, int stride,
           int groups, int group, float* out) {
  __m256 total[kCount][4];
  for (int t = 0; t < kCount; ++t)
    for (int i = 0; i < 4; ++i) total[t][i] = _mm256_setzero_ps();
  const __m256i nibble = _mm256_set1_epi8(15);
  for (int g = 0; g < groups; ++g) {
    __m256i sums[kCount][4];
    for (int t = 0; t < kCount; ++t) {
      // `products` removes the bias of 8-bit weights; only 4-bit ones need the offset.
      const __m256i first = kBits == 4 ? _mm256_set1_epi32(offsets[g * stride + t]) : _mm256_setzero_si256();
      for (int i = 0; i < 4; ++i) sums[t][i] = first;
    }
    const uint8_t* w = tiles + kScaleBytes;
    for (int k = 0; k < group; k += 4, w += 16 * kBits, values += 4 * stride) {
      _mm_prefetch(reinterpret_cast<const char*>(w + 4096), _MM_HINT_T0);
      __m256i x[kCount];
      for (int t = 0; t < kCount; ++t) {
        int32_t four;
        std::memcpy(&four, values + 4 * t, 4);
        x[t] = _mm256_set1_epi32(four);
      }
      for (int i = 0; i < 2; ++i) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * i));
        __m256i rows[2];
        if constexpr (kBits == 4) {
          rows[0] = _mm256_and_si256(low, nibble);
          rows[1] = _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble);
        } else {
          rows[0] = low;
          rows[1] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 64 + 32 * i));
        }
        for (int t = 0; t < kCount; ++t) {
          sums[t][i] = _mm256_add_epi32(sums[t][i], products<kBits>(rows[0], x[t]));
          sums[t][2 + i] = _mm256_add_epi32(sums[t][2 + i], products<kBits>(rows[1], x[t]));
        }
      }
    }
    for (int i = 0; i < 4; ++i) {
      const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tiles + 16 * i));
      const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
      for (int t = 0; t < kCount; ++t) {
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(scales[g * stride + t]));
        total[t][i] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums[t][i]), both, total[t][i]);
      }
    }
    tiles += kScaleBytes + int64_t(4) * kBits * group;
  }
  for (int t = 0; t < kCount; ++t)
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + t * kTileRows + 8 * i, total[t][i]);
}

template <int kBits>
void tile_row(const uint8_t* tiles, const Tokens& tokens, int inputs, int group, float* out) {
  const int count = tokens.count, groups = inputs / group;
  int t = 0;
  for (; t + 2 <= count; t += 2)
    block<kBits, 2>(tiles, tokens.values + 4 * t, tokens.scales + t, tokens.offsets + t, count, groups, group,
                    out + t * kTileRows);
  if (t < count)
    block<kBits, 1>(tiles, tokens.values + 4 * t, tokens.scales + t, tokens.offsets + t, count, groups, group,
                    out + t * kTileRows);
}

}  // namespace

namespace xv {
const Kernels kAvx2 = {generic_quantize, tile_row<4>,      tile_row<8>,      generic_store,
                       generic_dot_bf16, generic_rms_norm, generic_silu_mul, generic_rotate};
}  // namespace xv
#endif
