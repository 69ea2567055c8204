// x86 with AVX-512 VNNI; compiled again with AVX-512 BF16, and with AMX too.
#if defined(__x86_64__)
#include <immintrin.h>

#include "dots.h"
#include "generic.h"
#include "steps.h"
#include "unpack.h"
#if defined(__AMX_INT8__)
#include "amx.h"
#endif

namespace {

struct Vectors {
  static __m512i load(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static __m512i nibbles(__m512i stored) { return _mm512_and_si512(stored, _mm512_set1_epi8(15)); }
  static __m512i low(__m512i stored) { return nibbles(stored); }
  static __m512i high(__m512i stored) { return nibbles(_mm512_srli_epi16(stored, 4)); }
  static __m512i bytes(__m512i stored) { return stored; }

  using Table = __m512i;  // entries with their offset: unsigned
  static __m512i table(const int8_t* entries, int) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(entries));
    return _mm512_maskz_broadcast_i32x4(0xffff, _mm_add_epi8(sixteen, _mm_set1_epi8(int8_t(bias_of(kTable)))));
  }
  static __m512i indices(__m512i stored) { return nibbles(stored); }
  static __m512i high_indices(__m512i stored) { return high(stored); }
  static __m512i join(__m512i a, __m512i b, __m512i c) {
    constexpr int kSelect = 0xca;  // of the first operand's bits: those of the second, else of the third
    const __m512i last = _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x22), _mm512_srli_epi16(b, 2),
                                                   _mm512_srli_epi16(c, 1), kSelect);
    return _mm512_ternarylogic_epi32(_mm512_set1_epi8(0x11), _mm512_srli_epi16(a, 3), last, kSelect);
  }
  static __m512i lookup(__m512i table, __m512i indices) { return _mm512_shuffle_epi8(table, indices); }

  static __m512 scales(const uint8_t* tile, int half) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile + 32 * half));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  }
  static void store(uint8_t* to, __m512i x) { _mm512_storeu_si512(to, x); }
  static void add_scaled(float* out, const int32_t* sums, int32_t offset, __m512 scales, float scale) {
    const __m512i sum = _mm512_add_epi32(_mm512_loadu_si512(sums), _mm512_set1_epi32(offset));
    _mm512_storeu_ps(out, _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scales, _mm512_set1_ps(scale)),
                                          _mm512_loadu_ps(out)));
  }
};

// One instruction for each token and half tile, which broadcasts four inputs from memory. With the intrinsic the
// compiler loads the broadcasts into registers first; at 12 tokens none is free, and it spills accumulators.
inline void add_products(__m512i& sums, __m512i w, const int8_t* x) {
#if defined(XV_DOT_BROADCAST)
  XV_DOT_BROADCAST(sums, w, x);  // a test's emulation
#else
  asm volatile("vpdpbusd %2%{1to16%}, %1, %0"
               : "+v"(sums)
               : "v"(w), "m"(*reinterpret_cast<const int32_t*>(x)));
#endif
}

template <int kFormat, int kCount>
void block(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
  // With few tokens the latency of additions to one register is the limit: use two chains.
  constexpr int kChains = kCount <= 4 ? 2 : 1, kUnit = unit_steps(kFormat);
  constexpr int kSpan = kUnit > kChains ? kUnit : kChains;  // steps of four inputs at a time
  constexpr int kUnitBytes = 64 * unit_lines(kFormat), kSpanBytes = kSpan / kUnit * kUnitBytes;
  const Unpack<Vectors, kFormat> unpack(row);
  const uint8_t* tile = row + head_bytes(kFormat);
  __m512 total[kCount][2];
  for (int t = 0; t < kCount; ++t) total[t][0] = total[t][1] = _mm512_setzero_ps();
  const int8_t* x = tokens.values;
  for (int g = 0; g < inputs / group; ++g, tile += tile_bytes(kFormat, group)) {
    __m512i sums[kChains][kCount][2];
    for (int t = 0; t < kCount; ++t) {
      sums[0][t][0] = sums[0][t][1] = _mm512_set1_epi32(tokens.offsets[g * kCount + t]);
      if constexpr (kChains == 2) sums[1][t][0] = sums[1][t][1] = _mm512_setzero_si512();
    }
    const uint8_t* w = tile + kScaleBytes;
    for (int k = 0; k < group / 4; k += kSpan, w += kSpanBytes) {
#pragma GCC unroll 4
      for (int line = 0; line < kSpanBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(w + 4096 + line), _MM_HINT_T0);
#pragma GCC unroll 4
      for (int step = 0; step < kSpan; ++step, x += 4 * kCount) {
        __m512i low, high;
        unpack(w + step / kUnit * kUnitBytes, step % kUnit, low, high);
#pragma GCC unroll 12
        for (int t = 0; t < kCount; ++t) {
          add_products(sums[step % kChains][t][0], low, x + 4 * t);
          add_products(sums[step % kChains][t][1], high, x + 4 * t);
        }
      }
    }
    const __m512 scale[2] = {Vectors::scales(tile, 0), Vectors::scales(tile, 1)};
#pragma GCC unroll 12
    for (int t = 0; t < kCount; ++t) {
      const __m512 token_scale = _mm512_set1_ps(tokens.scales[g * kCount + t]);
      for (int half = 0; half < 2; ++half) {
        __m512i sum = sums[0][t][half];
        if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, sums[1][t][half]);
        total[t][half] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), _mm512_mul_ps(scale[half], token_scale),
                                         total[t][half]);
      }
    }
  }
  for (int t = 0; t < kCount; ++t) {
    _mm512_storeu_ps(out + t * kTileRows, total[t][0]);
    _mm512_storeu_ps(out + t * kTileRows + 16, total[t][1]);
  }
}

template <int kFormat>
void tile_row(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
#if defined(__AMX_INT8__)
  if (tokens.count >= kAmxFrom) return amx_row<Vectors, kFormat>(row, tokens, inputs, group, out);
#endif
  constexpr TileRow blocks[kBlockTokens] = {
      block<kFormat, 1>, block<kFormat, 2>, block<kFormat, 3>, block<kFormat, 4>,  block<kFormat, 5>,  block<kFormat, 6>,
      block<kFormat, 7>, block<kFormat, 8>, block<kFormat, 9>, block<kFormat, 10>, block<kFormat, 11>, block<kFormat, 12>};
  blocks[tokens.count - 1](row, tokens, inputs, group, out);
}

inline __m512 load16(const void* x, Type type, int64_t at) {
  if (type == kFloat32) return _mm512_loadu_ps(static_cast<const float*>(x) + at);
  const void* bits = static_cast<const uint16_t*>(x) + at;
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(bits))), 16));
}

void quantize(const void* x, Type type, int64_t stride, int count, int inputs, int group, int bias,
              int8_t* values, float* scales, int32_t* offsets) {
#if defined(__AMX_INT8__)
  const bool together = count >= kAmxFrom;  // [K/group, T, group]: a token's inputs are a row of a tile
#else
  constexpr bool together = false;
#endif
  const int64_t next_four = together ? 4 : 4 * count;
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  for (int t = 0; t < count; ++t) {
    for (int start = 0; start < inputs; start += group) {
      const int64_t from = t * stride + start;
      __m512i largest = _mm512_setzero_si512();  // as integers, magnitudes keep their order and NaN is the largest
      for (int k = 0; k < group; k += 16)
        largest = _mm512_max_epi32(
            largest, _mm512_and_si512(_mm512_castps_si512(load16(x, type, from + k)), magnitude));
      const int32_t bits = _mm512_reduce_max_epi32(largest);
      float maximum;
      std::memcpy(&maximum, &bits, 4);
      const bool finite = bits < 0x7f800000;
      const bool usable = finite && maximum > 127 * std::numeric_limits<float>::min();
      const __m512 inverse = _mm512_set1_ps(usable ? 127.0f / maximum : 0.0f);
      __m512i sum = _mm512_setzero_si512();
      int8_t* to = values + int64_t(start) * count + (together ? group : 4) * t;
      for (int k = 0; k < group; k += 16, to += 4 * next_four) {
        // Masked to zero: 0 * NaN would be NaN, which converts to the smallest integer.
        const __m512i rounded = _mm512_maskz_cvtps_epi32(
            usable ? 0xffff : 0, _mm512_mul_ps(load16(x, type, from + k), inverse));
        sum = _mm512_add_epi32(sum, rounded);
        const __m128i bytes = _mm512_cvtepi32_epi8(rounded);
        int32_t fours[4];
        std::memcpy(fours, &bytes, 16);
        for (int i = 0; i < 4; ++i) std::memcpy(to + i * next_four, fours + i, 4);
      }
      const int64_t at = int64_t(start / group) * count + t;
      scales[at] = finite ? (usable ? maximum / 127.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
      offsets[at] = -bias * _mm512_reduce_add_epi32(sum);
    }
  }
}

#if defined(__AVX512BF16__)
// One chain of sums for any number of rows and tokens, so that a token's bits are the same in any company; several rows
// hide the latency.
template <int kCount, int kRows>
void dot_block(const uint16_t* w, const uint16_t* x, int inputs, float* out, int out_stride) {
  const __mmask32 tail = (uint32_t(1) << (inputs % 32)) - 1;
  __m512 sums[kRows][kCount];
  for (auto& row : sums)
    for (auto& sum : row) sum = _mm512_setzero_ps();
  int k = 0;
  for (; k + 32 <= inputs; k += 32) {
    __m512bh weights[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint16_t* from = w + int64_t(r) * inputs + k;
      weights[r] = (__m512bh)_mm512_loadu_si512(from);
      _mm_prefetch(reinterpret_cast<const char*>(from + 2048), _MM_HINT_T1);
    }
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const __m512bh token = (__m512bh)_mm512_loadu_si512(x + int64_t(t) * inputs + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][t] = _mm512_dpbf16_ps(sums[r][t], weights[r], token);
    }
  }
  if (k < inputs) {
    for (int t = 0; t < kCount; ++t) {
      const __m512bh token = (__m512bh)_mm512_maskz_loadu_epi16(tail, x + int64_t(t) * inputs + k);
      for (int r = 0; r < kRows; ++r) {
        const void* from = w + int64_t(r) * inputs + k;
        sums[r][t] = _mm512_dpbf16_ps(sums[r][t], (__m512bh)_mm512_maskz_loadu_epi16(tail, from), token);
      }
    }
  }
  for (int t = 0; t < kCount; ++t)
    for (int r = 0; r < kRows; ++r) out[t * out_stride + r] = _mm512_reduce_add_ps(sums[r][t]);
}

template <int kCount, int kRows>
void dot_blocks(const uint16_t* w, int rows, const uint16_t* x, int inputs, float* out) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_block<kCount, kRows>(w + int64_t(r) * inputs, x, inputs, out + r, rows);
  for (; r < rows; ++r) dot_block<kCount, 1>(w + int64_t(r) * inputs, x, inputs, out + r, rows);
}

template <int kCount>
void dot_rows(const uint16_t* w, int rows, const uint16_t* x, int inputs, float* out) {
  dot_blocks<kCount, kCount <= 4 ? 4 : 3>(w, rows, x, inputs, out);
}

void dot_bf16(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs, float* out) {
  using Dot = void (*)(const uint16_t*, int, const uint16_t*, int, float*);
  constexpr Dot dots[] = {dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
                          dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
  for (int t = 0; t < count; t += 8) {
    const int tokens = count - t < 8 ? count - t : 8;
    dots[tokens - 1](w, rows, x + int64_t(t) * inputs, inputs, out + t * rows);
  }
}
#else
constexpr auto dot_bf16 = generic_dot_bf16;
#endif

#if defined(__AMX_INT8__)
#define XV_TABLE_NAME kAvx512Amx
constexpr int kBlock = kAmxTokens;
#elif defined(__AVX512BF16__)
#define XV_TABLE_NAME kAvx512Bf16
constexpr int kBlock = kBlockTokens;
#else
#define XV_TABLE_NAME kAvx512
constexpr int kBlock = kBlockTokens;
#endif

}  // namespace

namespace xv {
const Kernels XV_TABLE_NAME = {quantize,          tile_row<4>,       tile_row<8>,   tile_row<kTable2>,
                          tile_row<kTable3>, tile_row<kTable4>, generic_store, dot_bf16, generic_dot_f32, generic_expand,
                          generic_rms_norm,  generic_silu_mul,  generic_rotate, kBlock};
}  // namespace xv
#endif
