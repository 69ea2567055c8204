// x86 with AVX2 and FMA; compiled again with AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "blocks.h"
#include "dots.h"
#include "generic.h"
#include "steps.h"

namespace {

struct Vectors {
  static constexpr int kRows = 8;
  using Inputs = __m256i;
  template <int kBits>
  using Sums = __m256i;
  using Wide = __m256i;

  static __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static __m256i inputs(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
  }
  template <int kBits>
  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i wide(int32_t value) { return _mm256_set1_epi32(value); }
  static __m256i nibbles(__m256i stored) { return _mm256_and_si256(stored, _mm256_set1_epi8(15)); }

  static __m256 scales(const uint8_t* tile, int row) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(tile + 2 * row));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }
  static void add_scaled(float* out, __m256i sums, __m256 scales, float scale) {
    const __m256 both = _mm256_mul_ps(scales, _mm256_set1_ps(scale));
    _mm256_storeu_ps(out, _mm256_fmadd_ps(_mm256_cvtepi32_ps(sums), both, _mm256_loadu_ps(out)));
  }
};

#if defined(__AVXVNNI__)
#define XV_TABLE kAvxVnni

// One instruction multiplies unsigned weights by inputs and adds to 32 bits.
struct Isa : Vectors {
  using Weights = __m256i;
  template <int kBits>
  static constexpr bool kUnsigned = true;
  template <int kBits>
  static constexpr int kTokens = 6;
  template <int kBits>
  static constexpr int parts(int tokens) { return tokens <= 3 ? 2 : 1; }
  template <int kBits>
  static int steps(int group) { return group / 4; }

  static __m256i low(__m256i stored) { return nibbles(stored); }
  static __m256i high(__m256i stored) { return nibbles(_mm256_srli_epi16(stored, 4)); }
  static __m256i bytes(__m256i stored) { return stored; }
  template <int kBits>
  static __m256i add(__m256i sums, __m256i weights, __m256i inputs) {
    return _mm256_dpbusd_avx_epi32(sums, weights, inputs);
  }
  template <int kBits>
  static __m256i widen(__m256i wide, __m256i sums) { return _mm256_add_epi32(wide, sums); }
};
#else
#define XV_TABLE kAvx2

// vpmaddubsw adds pairs of products of an unsigned and a signed byte in 16 bits.
struct Isa : Vectors {
  // With 4 bits weights enter as they are stored, at most 15: eight pairs of products with 127 fit in 16 bits. With 8
  // bits they enter as magnitudes, with their sign moved to the other factor: one pair, at most 2 * 128 * 127, fits.
  struct Weights {
    __m256i magnitudes, values;  // the latter for 8 bits
  };
  template <int kBits>
  static constexpr bool kUnsigned = kBits == 4;
  template <int kBits>
  static constexpr int kTokens = kBits == 4 ? 6 : 4;
  template <int kBits>
  static constexpr int parts(int tokens) { return tokens <= (kBits == 4 ? 3 : 2) ? 2 : 1; }
  template <int kBits>
  static constexpr int steps(int) { return 8; }

  static Weights low(__m256i stored) { return {nibbles(stored), stored}; }
  static Weights high(__m256i stored) { return {nibbles(_mm256_srli_epi16(stored, 4)), stored}; }
  static Weights bytes(__m256i stored) {
    const __m256i values = _mm256_xor_si256(stored, _mm256_set1_epi8(int8_t(0x80)));
    return {_mm256_abs_epi8(values), values};
  }
  template <int kBits>
  static __m256i add(__m256i sums, const Weights& weights, __m256i inputs) {
    if constexpr (kBits == 4) return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights.magnitudes, inputs));
    const __m256i pairs = _mm256_maddubs_epi16(weights.magnitudes, _mm256_sign_epi8(inputs, weights.values));
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int kBits>
  static __m256i widen(__m256i wide, __m256i sums) {
    return _mm256_add_epi32(wide, kBits == 4 ? _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) : sums);
  }
};
#endif

}  // namespace

namespace xv {
const Kernels XV_TABLE = {
    generic_quantize, tile_row_of<Isa, 4>, tile_row_of<Isa, 8>, generic_store, generic_dot_bf16,
    generic_dot_f32, generic_expand, generic_rms_norm, generic_silu_mul, generic_rotate};
}  // namespace xv
#endif
