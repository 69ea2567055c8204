// For any processor: plain C++ with the vector types of GCC and Clang, 128 bits wide (SSE2, NEON and their like).
#include "blocks.h"
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
  template <int kFormat>
  using Sums = std::conditional_t<kFormat == 4, Shorts, Ints>;
  template <int kFormat>
  static int32_t offset(int32_t of, int) { return kFormat == 4 ? of : 0; }
  template <int kFormat>
  static constexpr int kTokens = 4;
  template <int kFormat>
  static constexpr int parts(int tokens) { return tokens == 1 ? 4 : tokens == 2 ? 2 : 1; }
  template <int kFormat>
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

  template <int kFormat>
  static Sums<kFormat> zero() { return Sums<kFormat>{}; }
  static Ints wide(int32_t value) { return Ints{value, value, value, value}; }
  static Ints add_pairs(Shorts pairs) { return (Ints(pairs) << 16 >> 16) + (Ints(pairs) >> 16); }

  template <int kFormat>
  static Sums<kFormat> add(Sums<kFormat> sums, const Pair& weights, const Pair& inputs) {
    const Shorts products = weights.even * inputs.even + weights.odd * inputs.odd;
    if constexpr (kFormat == 4)
      return sums + products;
    else
      return sums + add_pairs(products);
  }
  template <int kFormat>
  static Ints widen(Ints wide, Sums<kFormat> sums) {
    if constexpr (kFormat == 4)
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

// Vectors of one byte for each weight, by comparisons: the vector types have no table lookup that every processor does
// in an instruction.
struct Bytes {
  typedef int8_t Vector __attribute__((vector_size(16)));
  struct Table {
    int8_t first, steps[15];
  };
  static Vector load(const uint8_t* from) {
    Vector bytes;
    std::memcpy(&bytes, from, 16);
    return bytes;
  }
  static Table table(const int8_t* entries) {
    Table table{entries[0], {}};
    for (int i = 0; i < 15; ++i) table.steps[i] = int8_t(entries[i + 1] - entries[i]);
    return table;
  }
  static Vector shift(Vector bytes, int count) { return Vector(Stored(bytes) >> count); }
  static Vector indices(Vector stored) { return stored & 15; }
  static Vector high_indices(Vector stored) { return shift(stored, 4) & 15; }
  static Vector join(Vector a, Vector b, Vector c) {
    return (shift(a, 3) & 0x11) | (shift(b, 2) & 0x22) | (shift(c, 1) & 0x44);
  }
};

// Sums of entries, one at a time, of those below each index.
template <int kEntries>
inline Bytes::Vector entries_of(const Bytes::Table& table, Bytes::Vector indices) {
  Bytes::Vector bytes = Bytes::Vector{} + table.first;
  for (int8_t i = 0; i < kEntries - 1; ++i) bytes += Bytes::Vector(indices > i) & table.steps[i];
  return bytes;
}

// A tile of a table's weights as a tile of 8 bits, at `to`.
template <int kFormat>
void widen_tile(const Bytes::Table& table, const uint8_t* tile, int group, uint8_t* to) {
  constexpr int kUnit = unit_steps(kFormat), kEntries = 1 << bits_of(kFormat);
  constexpr int8_t kMask = kEntries - 1;
  std::memcpy(to, tile, kScaleBytes);
  const uint8_t* values = tile + kScaleBytes;
  to += kScaleBytes;
  for (int k = 0; k < group / 4; k += kUnit, values += 64 * unit_lines(kFormat))
    for (int step = 0; step < kUnit; ++step, to += 128)
      for (int part = 0; part < 64; part += 16) {
        const uint8_t* w = values + part;
        Bytes::Vector first, second;
        if constexpr (kFormat == kTable2) {
          const Bytes::Vector stored = Bytes::load(w);
          const Bytes::Vector nibbles = step == 0 ? Bytes::indices(stored) : Bytes::high_indices(stored);
          first = nibbles & 3, second = Bytes::shift(nibbles, 2) & 3;
        } else {
          const Bytes::Vector stored = kFormat == kTable3 && step == 3
                                           ? Bytes::join(Bytes::load(w), Bytes::load(w + 64), Bytes::load(w + 128))
                                           : Bytes::load(w + 64 * step);
          first = Bytes::indices(stored) & kMask, second = Bytes::high_indices(stored) & kMask;
        }
        first = entries_of<kEntries>(table, first) ^ int8_t(-128);
        second = entries_of<kEntries>(table, second) ^ int8_t(-128);
        std::memcpy(to + part, &first, 16);
        std::memcpy(to + 64 + part, &second, 16);
      }
}

// The products are those of 8 bits.
template <int kFormat>
void table_row(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
  std::memset(out, 0, sizeof(float) * kTileRows * tokens.count);
  int8_t entries[16];
  std::memcpy(entries, row, 16);
  const Bytes::Table table = Bytes::table(entries);
  const uint8_t* tile = row + head_bytes(kFormat);
  uint8_t wide[kScaleBytes + kTileRows * kLargestGroup];
  for (int g = 0; g < inputs / group; ++g, tile += tile_bytes(kFormat, group)) {
    widen_tile<kFormat>(table, tile, group, wide);
    group_blocks<Isa, 8>(Unpack<Isa, 8>(nullptr), wide, tokens, 0, g, group, out);
  }
}

}  // namespace

namespace xv {
const Kernels kPortable = {generic_quantize,   tile_row_of<Isa, 4>, tile_row_of<Isa, 8>, table_row<kTable2>,
                           table_row<kTable3>, table_row<kTable4>,  generic_store,       generic_dot_bf16,
                           generic_rms_norm,   generic_silu_mul,    generic_rotate};
}  // namespace xv
