// The product of a row of tiles with a block of tokens, for any instruction set: which sums are in registers, and how
// often they are widened. In an unnamed namespace: each translation unit that includes this file has its own copy.
//
// An instruction set `Isa` describes its vectors (beside what unpack.h needs):
//   Weights      kRows rows by four inputs of a tile
//   Inputs       four inputs of one token, repeated for each row
//   Sums<kFormat>  running sums of kRows rows; `add<kFormat>(sums, weights, inputs)` adds products
//   Wide         32-bit sums of kRows rows; `widen<kFormat>(wide, sums)` adds running sums
//   steps<kFormat>(group)         steps of four inputs that the running sums can hold
//   kTokens<kFormat>, parts<kFormat>(tokens)  how many tokens, and vectors of stored bytes, fit in the registers
//   offset<kFormat>(of, smallest)  what corrects the offset that weights enter with, from Tokens::offsets and the table's
//                smallest entry
//   scales(tile, row)             of kRows rows, as floats
//   add_scaled(out, wide, scales, scale)  out [kRows] += wide * the scales of the rows * the token's scale
#pragma once

#include "unpack.h"

namespace {

// One group of inputs of kParts vectors of rows, for kTokens tokens. x and out: this token chunk's first.
template <class Isa, int kFormat, int kTokens>
void group_block(const Unpack<Isa, kFormat>& unpack, const uint8_t* tile, const Tokens& tokens, int first, int g,
                 int group, float* out) {
  constexpr int kParts = Isa::template parts<kFormat>(kTokens), kBytes = 4 * Isa::kRows;
  constexpr int kUnit = unit_steps(kFormat), kLines = unit_lines(kFormat);
  const int count = tokens.count;
  const float* scales = tokens.scales + int64_t(g) * count + first;
  const int32_t* offsets = tokens.offsets + int64_t(g) * count + first;
  const int steps = Isa::template steps<kFormat>(group);
  for (int part = 0; part < 64 / kBytes; part += kParts) {
    const int8_t* x = tokens.values + int64_t(g) * group * count + 4 * first;
    const uint8_t* w = tile + kScaleBytes + part * kBytes;
    typename Isa::Wide wide[kTokens][2 * kParts];
    for (int t = 0; t < kTokens; ++t)
      for (auto& sum : wide[t]) sum = Isa::wide(Isa::template offset<kFormat>(offsets[t], unpack.smallest));
    for (int k = 0; k < group / 4; k += steps) {
      typename Isa::template Sums<kFormat> sums[kTokens][2 * kParts];
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kParts; ++v) sums[t][v] = Isa::template zero<kFormat>();
      for (int unit = 0; unit < steps; unit += kUnit, w += 64 * kLines) {
#pragma GCC unroll 4
        for (int step = 0; step < kUnit; ++step, x += 4 * count) {
          if (part == 0 && step < kLines) __builtin_prefetch(w + 4096 + 64 * step);
          typename Isa::Weights weights[2 * kParts];
#pragma GCC unroll 4
          for (int p = 0; p < kParts; ++p) unpack(w + p * kBytes, step, weights[2 * p], weights[2 * p + 1]);
#pragma GCC unroll 8
          for (int t = 0; t < kTokens; ++t) {
            const auto inputs = Isa::inputs(x + 4 * t);
#pragma GCC unroll 8
            for (int v = 0; v < 2 * kParts; ++v)
              sums[t][v] = Isa::template add<kFormat>(sums[t][v], weights[v], inputs);
          }
        }
      }
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * kParts; ++v) wide[t][v] = Isa::template widen<kFormat>(wide[t][v], sums[t][v]);
    }
    for (int v = 0; v < 2 * kParts; ++v) {
      const int row = (part + v / 2) * Isa::kRows + 16 * (v % 2);
      const auto row_scales = Isa::scales(tile, row);
      for (int t = 0; t < kTokens; ++t) Isa::add_scaled(out + t * kTileRows + row, wide[t][v], row_scales, scales[t]);
    }
  }
}

// The tokens from `first` on.
template <class Isa, int kFormat, int kTokens = Isa::template kTokens<kFormat>>
void group_blocks(const Unpack<Isa, kFormat>& unpack, const uint8_t* tile, const Tokens& tokens, int first, int g,
                  int group, float* out) {
  for (; tokens.count - first >= kTokens; first += kTokens)
    group_block<Isa, kFormat, kTokens>(unpack, tile, tokens, first, g, group, out + first * kTileRows);
  if constexpr (kTokens > 1)
    if (first < tokens.count) group_blocks<Isa, kFormat, kTokens - 1>(unpack, tile, tokens, first, g, group, out);
}

template <class Isa, int kFormat>
void tile_row_of(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
  std::memset(out, 0, sizeof(float) * kTileRows * tokens.count);
  const Unpack<Isa, kFormat> unpack(row);
  const uint8_t* tile = row + head_bytes(kFormat);
  for (int g = 0; g < inputs / group; ++g, tile += tile_bytes(kFormat, group))
    group_blocks<Isa, kFormat>(unpack, tile, tokens, 0, g, group, out);
}

}  // namespace
