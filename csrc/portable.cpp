// For any processor: plain C++ with the vector types of GCC and Clang, 128 bits wide (SSE2, NEON and their like).
#include "blocks.h"
#include "dots.h"
#include "generic.h"
#include "steps.h"

namespace {

typedef uint16_t Stored __attribute__((vector_size(16)));
typedef int16_t Shorts __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(16)));
typedef float Floats __attribute__((vector_size(16)));

// Bytes are multiplied in 16 bits, those at even places and those at odd places of a row apart. Products of 4-bit weights
// as they are stored, at most 15, with inputs of at most 127 add up in 16 bits eight times; those of 8-bit weights, at
// most 128 in magnitude, once.
struct Isa {
  static constexpr int kRows = 4;
  struct Pair {
    Shorts even, odd;
  };
  using Weights = Pair;
  using Inputs = Pair;
  using Wide = Ints;
  template <int kBits>
  using Sums = std::conditional_t<kBits == 4, Shorts, Ints>;
  template <int kBits>
  static constexpr bool kUnsigned = kBits == 4;
  template <int kBits>
  static constexpr int kTokens = 4;
  template <int kBits>
  static constexpr int parts(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
  template <int kBits>
  static constexpr int steps(int) { return 8; }

  static Stored load(const uint8_t* from) {
    Stored bits;
    std::memcpy(&bits, from, 16);
    return bits;
  }
  static Pair signed_bytes(Stored bits) { return {Shorts(bits << 8) >> 8, Shorts(bits) >> 8}; }
  static Pair low(Stored stored) { return {Shorts(stored & 15), Shorts((stored >> 8) & 15)}; }
  static Pair high(Stored stored) { return {Shorts((stored >> 4) & 15), Shorts(stored >> 12)}; }
  static Pair bytes(Stored stored) { return signed_bytes(stored ^ 0x8080); }
  static Pair inputs(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, 4);
    return signed_bytes(Stored(Ints{four, four, four, four}));
  }

  template <int kBits>
  static Sums<kBits> zero() { return Sums<kBits>{}; }
  static Ints wide(int32_t value) { return Ints{value, value, value, value}; }
  static Ints add_pairs(Shorts pairs) { return (Ints(pairs) << 16 >> 16) + (Ints(pairs) >> 16); }

  template <int kBits>
  static Sums<kBits> add(Sums<kBits> sums, const Pair& weights, const Pair& inputs) {
    const Shorts products = weights.even * inputs.even + weights.odd * inputs.odd;
    if constexpr (kBits == 4)
      return sums + products;
    else
      return sums + add_pairs(products);
  }
  template <int kBits>
  static Ints widen(Ints wide, Sums<kBits> sums) {
    if constexpr (kBits == 4)
      return wide + add_pairs(sums);
    else
      return wide + sums;
  }

  static Floats scales(const uint8_t* tile, int row) {
    uint16_t bits[4];
    std::memcpy(bits, tile + 2 * row, 8);
    return Floats{to_float(bits[0]), to_float(bits[1]), to_float(bits[2]), to_float(bits[3])};
  }
  static void add_scaled(float* out, Ints sums, Floats scales, float scale) {
    Floats old;
    std::memcpy(&old, out, 16);
    old += __builtin_convertvector(sums, Floats) * (scales * scale);
    std::memcpy(out, &old, 16);
  }
};

}  // namespace

namespace xv {
const Kernels kPortable = {
    generic_quantize, tile_row_of<Isa, 4>, tile_row_of<Isa, 8>, generic_store, generic_dot_bf16,
    generic_dot_f32, generic_expand, generic_rms_norm, generic_silu_mul, generic_rotate};
}  // namespace xv
