// The table of one instruction set: products with quantised and bfloat16 weights, and the steps between them. Each
// instruction set is a separate translation unit, compiled with its own flags; instruction_sets.h lists the tables.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#include "xverse_kernels.h"

namespace xv {

constexpr int kTileRows = 32;    // output rows of a tile of quantised weights
constexpr int kScaleBytes = 64;  // 32 bfloat16 scales at the start of a tile
constexpr int kLargestGroup = 128;
constexpr int kBlockTokens = 12; // tokens in a block: their 24 int32 accumulators nearly fill the AVX-512 registers
constexpr int kMaxTokens = 32;   // in a block of any instruction set

// The formats of quantised weights (XvFormat), as constants for templates.
constexpr int kTable = XV_TABLE, kTable2 = kTable + 2, kTable3 = kTable + 3, kTable4 = kTable + 4;
constexpr bool is_table(int format) { return format >= kTable; }
constexpr int bits_of(int format) { return format & 15; }
// Values as unsigned bytes have this offset.
constexpr int bias_of(int format) { return format == 4 ? 8 : 128; }
constexpr int kTableBytes = 64;  // at the start of a row of tiles: 16 entries, repeated if there are fewer
constexpr int64_t head_bytes(int format) { return is_table(format) ? kTableBytes : 0; }
constexpr int64_t tile_bytes(int format, int group) { return kScaleBytes + int64_t(4) * bits_of(format) * group; }
constexpr int64_t row_bytes(int format, int64_t inputs, int group) {
  return head_bytes(format) + inputs / group * tile_bytes(format, group);
}

enum Type : int { kFloat32 = XV_FLOAT32, kBFloat16 = XV_BFLOAT16, kInt8 = XV_INT8 };

inline int64_t size_of(int type) { return type == kFloat32 ? 4 : type == kBFloat16 ? 2 : 1; }

// A block of up to kMaxTokens tokens, quantised to int8 with one scale for each token and group of inputs.
struct Tokens {
  int count;              // T
  const int8_t* values;   // [K/4, T, 4], four adjacent inputs of a token are contiguous; for AMX see avx512.cpp
  const float* scales;    // [K/group, T]
  const int32_t* offsets; // [K/group, T]: -bias * sum(values) of the group, as weights are stored unsigned
};

// One row of tiles (32 outputs, all inputs) times a block of tokens: out [T, 32].
using TileRow = void (*)(const uint8_t* tiles, const Tokens& tokens, int inputs, int group, float* out);

struct Kernels {
  // Quantises `count` rows of `inputs` values, `stride` elements apart, to the arrays of Tokens. `bias` is the offset of
  // the unsigned weights. A group with NaN or infinity gets the scale NaN.
  void (*quantize)(const void* x, Type type, int64_t stride, int count, int inputs, int group, int bias,
                   int8_t* values, float* scales, int32_t* offsets);

  // By format: see row_product.
  TileRow tile_row4, tile_row8, table_row2, table_row3, table_row4;

  // Converts `count` outputs to the type of the result.
  void (*store)(const float* from, void* to, Type type, int count);

  // Dot products of rows: out [count, rows] = x [count, inputs] times the transpose of w [rows, inputs].
  void (*dot_bf16)(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs, float* out);
  void (*dot_f32)(const float* w, int rows, const float* x, int count, int inputs, float* out);

  // y [count] += down [rank] times `count` columns of b [rank, outputs]; b and y are of `type`.
  void (*expand)(const void* b, Type type, const float* down, int rank, int64_t outputs, void* y, int count);

  // The steps between the products: steps.h.
  void (*rms_norm)(const void* x, const void* weight, void* y, Type type, Type weight_type, int64_t rows,
                   int size, float eps);
  void (*silu_mul)(const void* gate, const void* up, void* y, Type type, int64_t count);
  void (*rotate)(void* x, const void* cos, const void* sin, Type type, int heads, int head_dim);

  int block = kBlockTokens;  // tokens in a block
};

inline TileRow row_product(const Kernels& kernels, int format) {
  if (!is_table(format)) return format == 4 ? kernels.tile_row4 : kernels.tile_row8;
  return format == kTable2 ? kernels.table_row2 : format == kTable3 ? kernels.table_row3 : kernels.table_row4;
}

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
extern const Kernels kAvx512Amx;
#elif defined(__aarch64__)
extern const Kernels kNeonDot;
extern const Kernels kNeonI8mm;
extern const Kernels kNeonBf16;
#endif

inline float to_float(uint16_t bits) {
  union {
    uint32_t integer;
    float value;
  } pun{uint32_t(bits) << 16};
  return pun.value;
}

// The nearest integer, ties to even, of |x| < 2^22.
inline float nearest(float x) {
#if defined(__x86_64__) && !defined(__SSE4_1__)
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: the sum has no bits below one
  return (x + kMagic) - kMagic;          // SSE2 has no instruction for it: the library's function does not vectorise
#else
  return std::nearbyintf(x);
#endif
}

// Rounds to nearest, ties to even; NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  union {
    float value;
    uint32_t integer;
  } pun{value};
  if ((pun.integer & 0x7fffffff) > 0x7f800000) return uint16_t((pun.integer >> 16) | 64);
  return uint16_t((pun.integer + 0x7fff + ((pun.integer >> 16) & 1)) >> 16);
}

}  // namespace xv
