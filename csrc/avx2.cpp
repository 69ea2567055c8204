// x86 with AVX2 and FMA; compiled again with AVX-VNNI.
#if defined(__x86_64__)
#include <immintrin.h>

#include "blocks.h"
#include "generic.h"
#include "steps.h"

namespace {

struct Vectors {
  static constexpr int kRows = 8;
  using Inputs = __m256i;
  template <int kFormat>
  using Sums = __m256i;
  using Wide = __m256i;

  static __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static __m256i inputs(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return _mm256_set1_epi32(four);
  }
  template <int kFormat>
  static __m256i zero() { return _mm256_setzero_si256(); }
  static __m256i wide(int32_t value) { return _mm256_set1_epi32(value); }
  static __m256i nibbles(__m256i stored) { return _mm256_and_si256(stored, _mm256_set1_epi8(15)); }

  static __m256i entries(const int8_t* sixteen, int offset) {
    const __m128i signed_bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(sixteen));
    return _mm256_broadcastsi128_si256(_mm_add_epi8(signed_bytes, _mm_set1_epi8(int8_t(offset))));
  }
  static __m256i indices(__m256i stored) { return nibbles(stored); }
  static __m256i high_indices(__m256i stored) { return nibbles(_mm256_srli_epi16(stored, 4)); }
  static __m256i join(__m256i a, __m256i b, __m256i c) {
    const auto bit = [](__m256i shifted, char mask) { return _mm256_and_si256(shifted, _mm256_set1_epi8(mask)); };
    return _mm256_or_si256(_mm256_or_si256(bit(_mm256_srli_epi16(a, 3), 0x11), bit(_mm256_srli_epi16(b, 2), 0x22)),
                           bit(_mm256_srli_epi16(c, 1), 0x44));
  }

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
#define XV_TABLE_NAME kAvxVnni

// One instruction multiplies unsigned weights by inputs and adds to 32 bits.
struct Isa : Vectors {
  using Weights = __m256i;
  using Table = __m256i;
  template <int kFormat>
  static int32_t offset(int32_t of, int) { return of; }
  template <int kFormat>
  static constexpr int kTokens = 6;
  template <int kFormat>
  static constexpr int parts(int tokens) { return tokens <= 3 ? 2 : 1; }
  template <int kFormat>
  static int steps(int group) { return group / 4; }

  static __m256i low(__m256i stored) { return nibbles(stored); }
  static __m256i high(__m256i stored) { return nibbles(_mm256_srli_epi16(stored, 4)); }
  static __m256i bytes(__m256i stored) { return stored; }
  static Table table(const int8_t* sixteen, int) { return entries(sixteen, bias_of(kTable)); }
  static __m256i lookup(Table table, __m256i indices) { return _mm256_shuffle_epi8(table, indices); }
  template <int kFormat>
  static __m256i add(__m256i sums, __m256i weights, __m256i inputs) {
    return _mm256_dpbusd_avx_epi32(sums, weights, inputs);
  }
  template <int kFormat>
  static __m256i widen(__m256i wide, __m256i sums) { return _mm256_add_epi32(wide, sums); }
};

template <int kFormat>
constexpr TileRow tile_row = tile_row_of<Isa, kFormat>;
#else
#define XV_TABLE_NAME kAvx2

// vpmaddubsw adds pairs of products of an unsigned and a signed byte in 16 bits. With 4 bits weights enter as they are
// stored, at most 15: eight pairs of products with 127 fit in 16 bits. Entries of a narrow table enter as
// their difference to the smallest, at most 127: one pair fits. With 8 bits and other tables weights enter as magnitudes, with their sign
// moved to the other factor: one pair, at most 2 * 128 * 127, fits.
template <bool kNarrow>
struct IsaOf : Vectors {
  struct Weights {
    __m256i magnitudes, values;  // the latter where the sign moves
  };
  using Table = Weights;
  template <int kFormat>
  static constexpr bool kMovesSign = kFormat == 8 || (is_table(kFormat) && !kNarrow);
  template <int kFormat>
  static int32_t offset(int32_t of, int smallest) {
    return kFormat == 4 ? of : kMovesSign<kFormat> ? 0 : of / bias_of(kTable) * -smallest;
  }
  template <int kFormat>
  static constexpr int kTokens = kFormat == 4 ? 6 : 4;
  template <int kFormat>
  static constexpr int parts(int tokens) { return tokens <= (kFormat == 4 ? 3 : 2) ? 2 : 1; }
  template <int kFormat>
  static constexpr int steps(int) { return 8; }

  static Weights low(__m256i stored) { return {nibbles(stored), stored}; }
  static Weights high(__m256i stored) { return {nibbles(_mm256_srli_epi16(stored, 4)), stored}; }
  static Weights bytes(__m256i stored) {
    const __m256i values = _mm256_xor_si256(stored, _mm256_set1_epi8(int8_t(0x80)));
    return {_mm256_abs_epi8(values), values};
  }
  static Table table(const int8_t* sixteen, int smallest) {
    const __m256i values = entries(sixteen, 0);
    return {kNarrow ? entries(sixteen, -smallest) : _mm256_abs_epi8(values), values};
  }
  static Weights lookup(const Table& table, __m256i indices) {
    return {_mm256_shuffle_epi8(table.magnitudes, indices), kNarrow ? indices : _mm256_shuffle_epi8(table.values, indices)};
  }
  template <int kFormat>
  static __m256i add(__m256i sums, const Weights& weights, __m256i inputs) {
    if constexpr (kFormat == 4) return _mm256_add_epi16(sums, _mm256_maddubs_epi16(weights.magnitudes, inputs));
    if constexpr (kMovesSign<kFormat>) inputs = _mm256_sign_epi8(inputs, weights.values);
    const __m256i pairs = _mm256_maddubs_epi16(weights.magnitudes, inputs);
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int kFormat>
  static __m256i widen(__m256i wide, __m256i sums) {
    return _mm256_add_epi32(wide, kFormat == 4 ? _mm256_madd_epi16(sums, _mm256_set1_epi16(1)) : sums);
  }
};

template <int kFormat>
void tile_row(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
  if constexpr (is_table(kFormat)) {
    int smallest = 127, largest = -128;
    for (int i = 0; i < 16; ++i) {
      smallest = int8_t(row[i]) < smallest ? int8_t(row[i]) : smallest;
      largest = int8_t(row[i]) > largest ? int8_t(row[i]) : largest;
    }
    if (largest - smallest > 127) return tile_row_of<IsaOf<false>, kFormat>(row, tokens, inputs, group, out);
  }
  tile_row_of<IsaOf<true>, kFormat>(row, tokens, inputs, group, out);
}
#endif

}  // namespace

namespace xv {
const Kernels XV_TABLE_NAME = {generic_quantize,  tile_row<4>,       tile_row<8>,   tile_row<kTable2>,
                               tile_row<kTable3>, tile_row<kTable4>, generic_store, generic_dot_bf16,
                               generic_rms_norm,  generic_silu_mul,  generic_rotate};
}  // namespace xv
#endif
