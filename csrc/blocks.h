// The product of a row of tiles with a block of tokens, for any instruction set: which sums are in registers, and how
// often they are widened. In an unnamed namespace: each translation unit that includes this file has its own copy.
//
// An instruction set `Isa` describes its vectors:
//   Weights    kRows rows by four inputs of a tile; `load` reads stored bytes, `low` and `high` take their nibbles
//   Inputs     four inputs of one token, repeated for each row
//   Sums<kBits>  running sums of kRows rows; `add<kBits>(sums, weights, inputs)` adds products
//   Wide       32-bit sums of kRows rows; `widen<kBits>(wide, sums)` adds running sums
//   steps<kBits>(group)           steps of four inputs that the running sums can hold
//   kTokens<kBits>, parts<kBits>(tokens)  how many tokens, and vectors of stored bytes, fit in the registers
//   kUnsigned<kBits>              weights enter as they are stored, without the sign: Tokens::offsets corrects that
//   add_scaled(out, wide, tile, row, scale)  out [kRows] += wide * the scales of the tile's rows * the token's scale
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

using namespace xv;

// One group of inputs of kParts vectors of rows, for kTokens tokens. x and out: this token chunk's first.
template <class Isa, int kBits, int kTokens>
void group_block(const uint8_t* tile, const Tokens& tokens, int first, int g, int group, float* out) {
  constexpr int kParts = Isa::template parts<kBits>(kTokens), kBytes = 4 * Isa::kRows;
  const int count = tokens.count;
  const float* scales = tokens.scales + int64_t(g) * count + first;
  const int32_t* offsets = tokens.offsets + int64_t(g) * count + first;
  const int steps = Isa::template steps<kBits>(group);
  for (int part = 0; part < 64 / kBytes; part += kParts) {
    const int8_t* x = tokens.values + int64_t(g) * group * count + 4 * first;
    const uint8_t* w = tile + kScaleBytes + part * kBytes;
    typename Isa::Wide wide[kTokens][2 * kParts];
    for (int t = 0; t < kTokens; ++t)
      for (auto& sum : wide[t]) sum = Isa::wide(Isa::template kUnsigned<kBits> ? offsets[t] : 0);
    for (int k = 0; k < group / 4; k += steps) {
      typename Isa::template Sums<kBits> sums[kTokens][2 * kParts];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kParts; ++v) sums[t][v] = Isa::template zero<kBits>();
      for (int step = 0; step < steps; ++step, w += 16 * kBits, x += 4 * count) {
        if (part == 0) __builtin_prefetch(w + 4096);
        typename Isa::Weights weights[2 * kParts];
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
          const auto stored = Isa::load(w + p * kBytes);
          if constexpr (kBits == 4) {
            weights[2 * p] = Isa::low(stored);
            weights[2 * p + 1] = Isa::high(stored);
          } else {
            weights[2 * p] = Isa::bytes(stored);
            weights[2 * p + 1] = Isa::bytes(Isa::load(w + 64 + p * kBytes));
          }
        }
#pragma GCC unroll 8
        for (int t = 0; t < kTokens; ++t) {
          const auto inputs = Isa::inputs(x + 4 * t);
#pragma GCC unroll 8
          for (int v = 0; v < 2 * kParts; ++v) sums[t][v] = Isa::template add<kBits>(sums[t][v], weights[v], inputs);
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kParts; ++v) wide[t][v] = Isa::template widen<kBits>(wide[t][v], sums[t][v]);
    }
    for (int v = 0; v < 2 * kParts; ++v) {
      const int row = (part + v / 2) * Isa::kRows + 16 * (v % 2);
      const auto row_scales = Isa::scales(tile, row);
      for (int t = 0; t < kTokens; ++t) Isa::add_scaled(out + t * kTileRows + row, wide[t][v], row_scales, scales[t]);
    }
  }
}

template <class Isa, int kBits, int kTokens>
void group_blocks(const uint8_t* tile, const Tokens& tokens, int first, int g, int group, float* out) {
  if constexpr (kTokens > 1) {
    if (tokens.count - first < kTokens)
      return group_blocks<Isa, kBits, kTokens - 1>(tile, tokens, first, g, group, out);
  }
  group_block<Isa, kBits, kTokens>(tile, tokens, first, g, group, out + first * kTileRows);
}

template <class Isa, int kBits>
void tile_row_of(const uint8_t* tiles, const Tokens& tokens, int inputs, int group, float* out) {
  constexpr int kTokens = Isa::template kTokens<kBits>;
  std::memset(out, 0, sizeof(float) * kTileRows * tokens.count);
  for (int g = 0; g < inputs / group; ++g, tiles += kScaleBytes + int64_t(4) * kBits * group)
    for (int first = 0; first < tokens.count; first += kTokens)
      group_blocks<Isa, kBits, kTokens>(tiles, tokens, first, g, group, out);
}

}  // namespace
