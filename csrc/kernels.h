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
constexpr int kMaxTokens = 12;   // tokens in a block: their 24 int32 accumulators nearly fill the AVX-512 registers

enum Type : int { kFloat32 = XV_FLOAT32, kBFloat16 = XV_BFLOAT16, kInt8 = XV_INT8 };

inline int64_t size_of(int type) { return type == kFloat32 ? 4 : type == kBFloat16 ? 2 : 1; }

// A block of up to kMaxTokens tokens, quantised to int8 with one scale for each token and group of inputs.
struct Tokens {
  int count;              // T
  const int8_t* values;   // [K/4, T, 4]: four adjacent inputs of a token are contiguous
  const float* scales;    // [K/group, T]
  const int32_t* offsets; // [K/group, T]: -bias * sum(values) of the group, as weights are stored unsigned
};

struct Kernels {
  // Quantises `count` rows of `inputs` values, `stride` elements apart, to the arrays of Tokens. `bias`, 8 or 128, is
  // the offset of the stored unsigned weights. A group with NaN or infinity gets the scale NaN.
  void (*quantize)(const void* x, Type type, int64_t stride, int count, int inputs, int group, int bias,
                   int8_t* values, float* scales, int32_t* offsets);

  // One row of tiles (32 outputs, all inputs) times a block of tokens: out [T, 32].
  void (*tile_row4)(const uint8_t* tiles, const Tokens& tokens, int inputs, int group, float* out);
  void (*tile_row8)(const uint8_t* tiles, const Tokens& tokens, int inputs, int group, float* out);

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
};

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2;
extern const Kernels kAvxVnni;
extern const Kernels kAvx512;
extern const Kernels kAvx512Bf16;
#elif defined(__aarch64__)
extern const Kernels kNeonDot;
extern const Kernels kNeonI8mm;
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
