// Products of a row of tiles with up to 32 tokens by AMX, for prefill. A stored step (four inputs of 16 outputs, 64 bytes)
// is a row of the instruction's second matrix as it is, and a token's inputs, which `quantize` then keeps together, are a
// row of its first. Sums of a group are integers; they are scaled in the order of AVX-512's, so results are the same bits.
#pragma once

#include <immintrin.h>

#include "unpack.h"

namespace {

constexpr int kAmxTokens = kMaxTokens;  // two tiles of inputs by two of weights: four of sums, all eight that there are
constexpr int kAmxFrom = 5;  // fewer tokens use vpdpbusd: tiles would be nearly empty

// The compiler does not know what memory a tile instruction reads or writes.
inline void in_memory(const void* array) { asm volatile("" : : "r"(array) : "memory"); }

struct TileConfig {
  uint8_t palette = 1, first_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
  void shape(int tile, int count, int bytes) { rows[tile] = uint8_t(count), row_bytes[tile] = uint16_t(bytes); }
};

template <class V, int kFormat>
void amx_row(const uint8_t* row, const Tokens& tokens, int inputs, int group, float* out) {
  constexpr int kUnit = unit_steps(kFormat), kUnitBytes = 64 * unit_lines(kFormat);
  const int count = tokens.count, first = count < 16 ? count : 16, rest = count - first;
  const int depth = group % 64 == 0 ? 64 : 32, steps = depth / 4;  // inputs in a tile
  // 0 to 3: sums of `first` and of `rest` tokens by outputs 0 to 15 and 16 to 31; 4, 5: inputs; 6, 7: weights.
  alignas(64) TileConfig config;
  for (int half = 0; half < 2; ++half) {
    config.shape(half, first, 64), config.shape(6 + half, steps, 64);
    if (rest != 0) config.shape(2 + half, rest, 64);
  }
  config.shape(4, first, depth);
  if (rest != 0) config.shape(5, rest, depth);
  in_memory(&config);
  _tile_loadconfig(&config);

  alignas(64) uint8_t weights[2][16 * 64];
  alignas(64) int32_t sums[2][kAmxTokens * 16];
  std::memset(out, 0, sizeof(float) * kTileRows * count);
  const Unpack<V, kFormat> unpack(row);
  const uint8_t* tile = row + head_bytes(kFormat);
  for (int g = 0; g < inputs / group; ++g, tile += tile_bytes(kFormat, group)) {
    const uint8_t* w = tile + kScaleBytes;
    const int8_t* x = tokens.values + int64_t(g) * group * count;
    _tile_zero(0);
    _tile_zero(1);
    if (rest != 0) {
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int k = 0; k < group; k += depth, x += depth) {
      for (int step = 0; step < steps; step += kUnit, w += kUnitBytes) {
#pragma GCC unroll 4
        for (int line = 0; line < kUnitBytes; line += 64)
          _mm_prefetch(reinterpret_cast<const char*>(w + 4096 + line), _MM_HINT_T0);
#pragma GCC unroll 4
        for (int s = 0; s < kUnit; ++s) {
          decltype(V::load(w)) low, high;
          unpack(w, s, low, high);
          V::store(weights[0] + 64 * (step + s), low), V::store(weights[1] + 64 * (step + s), high);
        }
      }
      in_memory(weights);
      _tile_loadd(6, weights[0], 64);
      _tile_loadd(7, weights[1], 64);
      _tile_loadd(4, x, group);
      _tile_dpbsud(0, 4, 6);
      _tile_dpbsud(1, 4, 7);
      if (rest != 0) {
        _tile_loadd(5, x + int64_t(16) * group, group);
        _tile_dpbsud(2, 5, 6);
        _tile_dpbsud(3, 5, 7);
      }
    }
    in_memory(sums);
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    if (rest != 0) {
      _tile_stored(2, sums[0] + 16 * 16, 64);
      _tile_stored(3, sums[1] + 16 * 16, 64);
    }
    in_memory(sums);
    for (int half = 0; half < 2; ++half) {
      const auto scales = V::scales(tile, half);
      for (int t = 0; t < count; ++t)
        V::add_scaled(out + t * kTileRows + 16 * half, sums[half] + 16 * t, tokens.offsets[int64_t(g) * count + t],
                      scales, tokens.scales[int64_t(g) * count + t]);
    }
  }
  _tile_release();
}

}  // namespace
