// Arm with NEON and the dot-product instructions; compiled again with the matrix instructions of int8 (i8mm), and with
// those of bfloat16 too.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "blocks.h"
#include "generic.h"
#include "steps.h"

namespace {

inline float32x4_t row_scales(const uint8_t* tile, int row) {
  return vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(tile + 2 * row)), 16));
}

inline void add_to(float* out, int32x4_t sums, float32x4_t scales, float scale) {
  vst1q_f32(out, vfmaq_f32(vld1q_f32(out), vcvtq_f32_s32(sums), vmulq_n_f32(scales, scale)));
}

// sdot adds products of four signed bytes in 32 bits. Stored weights of 4 bits, at most 15, are signed bytes as they are.
struct Isa {
  static constexpr int kRows = 4;
  using Weights = int8x16_t;
  using Inputs = int8x16_t;
  using Wide = int32x4_t;
  template <int kFormat>
  using Sums = int32x4_t;
  template <int kFormat>
  static int32_t offset(int32_t of, int) { return kFormat == 4 ? of : 0; }
  template <int kFormat>
  static constexpr int kTokens = 6;
  template <int kFormat>
  static constexpr int parts(int tokens) { return tokens <= 3 ? 4 : 2; }
  template <int kFormat>
  static int steps(int group) { return group / 4; }

  static uint8x16_t load(const uint8_t* from) { return vld1q_u8(from); }
  static int8x16_t low(uint8x16_t stored) { return vreinterpretq_s8_u8(vandq_u8(stored, vdupq_n_u8(15))); }
  static int8x16_t high(uint8x16_t stored) { return vreinterpretq_s8_u8(vshrq_n_u8(stored, 4)); }
  static int8x16_t bytes(uint8x16_t stored) { return vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(0x80))); }
  using Table = int8x16_t;
  static int8x16_t table(const int8_t* entries, int) { return vld1q_s8(entries); }
  static uint8x16_t indices(uint8x16_t stored) { return vandq_u8(stored, vdupq_n_u8(15)); }
  static uint8x16_t high_indices(uint8x16_t stored) { return vshrq_n_u8(stored, 4); }
  static uint8x16_t join(uint8x16_t a, uint8x16_t b, uint8x16_t c) {
    const uint8x16_t last = vbslq_u8(vdupq_n_u8(0x22), vshrq_n_u8(b, 2), vshrq_n_u8(c, 1));
    return vbslq_u8(vdupq_n_u8(0x11), vshrq_n_u8(a, 3), last);
  }
  static int8x16_t lookup(int8x16_t table, uint8x16_t indices) { return vqtbl1q_s8(table, indices); }
  static int8x16_t inputs(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
  }
  template <int kFormat>
  static int32x4_t zero() { return vdupq_n_s32(0); }
  static int32x4_t wide(int32_t value) { return vdupq_n_s32(value); }
  template <int kFormat>
  static int32x4_t add(int32x4_t sums, int8x16_t weights, int8x16_t inputs) { return vdotq_s32(sums, weights, inputs); }
  template <int kFormat>
  static int32x4_t widen(int32x4_t wide, int32x4_t sums) { return vaddq_s32(wide, sums); }
  static float32x4_t scales(const uint8_t* tile, int row) { return row_scales(tile, row); }
  static void add_scaled(float* out, int32x4_t sums, float32x4_t scales, float scale) {
    add_to(out, sums, scales, scale);
  }
};

#if defined(__ARM_FEATURE_MATMUL_INT8)

// smmla multiplies two rows of eight inputs by two tokens of eight: twice the products of sdot.

inline int8x16_t zip_low(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s32(vzip1q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}
inline int8x16_t zip_high(int8x16_t a, int8x16_t b) {
  return vreinterpretq_s8_s32(vzip2q_s32(vreinterpretq_s32_s8(a), vreinterpretq_s32_s8(b)));
}

// One group of inputs of eight rows of a tile (four and the four sixteen further), for kPairs pairs of tokens.
template <int kFormat, int kPairs>
inline void matrix_part(const Unpack<Isa, kFormat>& unpack, const uint8_t* tile, int part, const Tokens& tokens,
                        int first, int g, int group, float* out) {
  // Two steps of four inputs at a time.
  constexpr int kUnit = unit_steps(kFormat), kStep = 64 * unit_lines(kFormat);
  constexpr int kSpan = kUnit > 2 ? kUnit : 2;
  const int count = tokens.count;
  const int8_t* x = tokens.values + int64_t(g) * group * count + 4 * first;
  const uint8_t* w = tile + kScaleBytes + part * 16;
  int32x4_t sums[kPairs][4];  // rows 0 and 1, 2 and 3, 16 and 17, 18 and 19: [row][token]
  for (auto& pair : sums)
    for (int32x4_t& sum : pair) sum = vdupq_n_s32(0);
  for (int k = 0; k < group / 4; k += kSpan, w += kSpan / kUnit * kStep) {
#pragma GCC unroll 2
    for (int step = 0; step < kSpan; step += 2, x += 8 * count) {
      int8x16_t rows[4], a, b, c, d;  // a, c: inputs 0 to 3; b, d: inputs 4 to 7
      unpack(w + step / kUnit * kStep, step % kUnit, a, c);
      unpack(w + (step + 1) / kUnit * kStep, (step + 1) % kUnit, b, d);
      rows[0] = zip_low(a, b), rows[1] = zip_high(a, b), rows[2] = zip_low(c, d), rows[3] = zip_high(c, d);
#pragma GCC unroll 6
      for (int pair = 0; pair < kPairs; ++pair) {
        const int32x2_t low = vld1_s32(reinterpret_cast<const int32_t*>(x + 8 * pair));
        const int32x2_t high = vld1_s32(reinterpret_cast<const int32_t*>(x + 8 * pair + 4 * count));
        const int8x16_t both = vreinterpretq_s8_s32(vcombine_s32(vzip1_s32(low, high), vzip2_s32(low, high)));
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[pair][i] = vmmlaq_s32(sums[pair][i], rows[i], both);
      }
    }
  }
  for (int half = 0; half < 2; ++half) {
    const int row = 4 * part + 16 * half;
    const float32x4_t scales = row_scales(tile, row);
    for (int pair = 0; pair < kPairs; ++pair) {
      const int32x4_t a = sums[pair][2 * half], b = sums[pair][2 * half + 1];
      const int32x4_t of[2] = {vuzp1q_s32(a, b), vuzp2q_s32(a, b)};  // of the first and of the second token
      for (int i = 0; i < 2; ++i) {
        const int t = first + 2 * pair + i;
        const int32_t offset = Isa::offset<kFormat>(tokens.offsets[int64_t(g) * count + t], 0);
        add_to(out + t * kTileRows + row, vaddq_s32(of[i], vdupq_n_s32(offset)), scales,
               tokens.scales[int64_t(g) * count + t]);
      }
    }
  }
}

template <int kFormat>
void tile_row(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
  const int count = tokens.count;
  std::memset(out, 0, sizeof(float) * kTileRows * count);
  const Unpack<Isa, kFormat> unpack(row);
  const uint8_t* tile = row + head_bytes(kFormat);
  for (int g = 0; g < inputs / group; ++g, tile += tile_bytes(kFormat, group)) {
    int first = 0;
    const auto pairs = [&](auto constant) {
      constexpr int kPairs = decltype(constant)::value;
      for (; count - first >= 2 * kPairs; first += 2 * kPairs)
        for (int part = 0; part < 4; ++part)
          matrix_part<kFormat, kPairs>(unpack, tile, part, tokens, first, g, group, out);
    };
    pairs(std::integral_constant<int, 6>());
    pairs(std::integral_constant<int, 4>());
    pairs(std::integral_constant<int, 2>());
    pairs(std::integral_constant<int, 1>());
    group_blocks<Isa, kFormat, 1>(unpack, tile, tokens, first, g, group, out);
  }
}
#else
template <int kFormat>
constexpr auto tile_row = tile_row_of<Isa, kFormat>;
#endif

#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define XV_TABLE_NAME kNeonBf16

// Eight inputs of two rows: four of each, and the other four.
struct TwoRows {
  bfloat16x8_t low, high;
  static TwoRows load(const uint16_t* first, const uint16_t* second, int count) {
    uint16_t parts[2][8] = {};
    if (count < 8) {
      std::memcpy(parts[0], first, 2 * size_t(count)), std::memcpy(parts[1], second, 2 * size_t(count));
      first = parts[0], second = parts[1];
    }
    const uint64x2_t a = vreinterpretq_u64_u16(vld1q_u16(first)), b = vreinterpretq_u64_u16(vld1q_u16(second));
    return {vreinterpretq_bf16_u64(vzip1q_u64(a, b)), vreinterpretq_bf16_u64(vzip2q_u64(a, b))};
  }
};

// bfmmla adds products of two rows and two tokens, four inputs each. Each sum is of the same products in the same order for
// any number of rows and tokens; one that has no partner is its own.
template <int kRowPairs, int kTokenPairs>
void dot_pairs(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs, float* out, int out_rows) {
  float32x4_t sums[kRowPairs][kTokenPairs];
  for (auto& row : sums)
    for (float32x4_t& sum : row) sum = vdupq_n_f32(0);
  const auto pair = [&](const uint16_t* from, int index, int last, int k) {
    const int second = 2 * index + 1 < last ? 2 * index + 1 : 2 * index;
    return TwoRows::load(from + int64_t(2 * index) * inputs + k, from + int64_t(second) * inputs + k,
                         inputs - k < 8 ? inputs - k : 8);
  };
  for (int k = 0; k < inputs; k += 8) {
    TwoRows weights[kRowPairs];
    for (int r = 0; r < kRowPairs; ++r) weights[r] = pair(w, r, rows, k);
    for (int t = 0; t < kTokenPairs; ++t) {
      const TwoRows tokens = pair(x, t, count, k);
      for (int r = 0; r < kRowPairs; ++r) {
        sums[r][t] = vbfmmlaq_f32(sums[r][t], weights[r].low, tokens.low);
        sums[r][t] = vbfmmlaq_f32(sums[r][t], weights[r].high, tokens.high);
      }
    }
  }
  for (int r = 0; r < kRowPairs; ++r)
    for (int t = 0; t < kTokenPairs; ++t) {
      float four[4];  // [row][token]
      vst1q_f32(four, sums[r][t]);
      for (int i = 0; i < 4; ++i) {
        const int row = 2 * r + i / 2, token = 2 * t + i % 2;
        if (row < rows && token < count) out[token * out_rows + row] = four[i];
      }
    }
}

template <int kTokenPairs>
void dot_rows(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs, float* out) {
  constexpr int kRowPairs = kTokenPairs <= 2 ? 4 : 2;
  int r = 0;
  for (; r + 2 * kRowPairs <= rows; r += 2 * kRowPairs)
    dot_pairs<kRowPairs, kTokenPairs>(w + int64_t(r) * inputs, 2 * kRowPairs, x, count, inputs, out + r, rows);
  for (; r < rows; r += 2)
    dot_pairs<1, kTokenPairs>(w + int64_t(r) * inputs, rows - r < 2 ? 1 : 2, x, count, inputs, out + r, rows);
}

void dot_bf16(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs, float* out) {
  const auto run = count <= 2 ? dot_rows<1> : count <= 4 ? dot_rows<2> : count <= 6 ? dot_rows<3> : dot_rows<4>;
  run(w, rows, x, count, inputs, out);
}
#else
constexpr auto dot_bf16 = generic_dot_bf16;
#if defined(__ARM_FEATURE_MATMUL_INT8)
#define XV_TABLE_NAME kNeonI8mm
#else
#define XV_TABLE_NAME kNeonDot
#endif
#endif

}  // namespace

namespace xv {
const Kernels XV_TABLE_NAME = {generic_quantize,  tile_row<4>,       tile_row<8>,      tile_row<kTable2>,
                          tile_row<kTable3>, tile_row<kTable4>, generic_store,    dot_bf16,
                          generic_rms_norm,  generic_silu_mul,  generic_rotate};
}  // namespace xv
#endif
