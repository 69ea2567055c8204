// The tile instructions of csrc/amx.h on a processor without them, and those of AVX-512, for tests. What the processor
// refuses (undefined shapes, tiles that are not configured) ends the program.
#pragma once
#include "emulated_avx512.h"

#include <cstdlib>

namespace emulated {

struct Config {  // LDTILECFG's 64 bytes
  uint8_t palette, first_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Config) == 64);

inline Config config{};
inline uint8_t tiles[8][16][64];

inline void require(bool valid) {
  if (!valid) std::abort();
}
inline bool configured(int tile) { return config.palette == 1 && config.rows[tile] > 0 && config.row_bytes[tile] > 0; }

inline void load_config(const void* from) {
  require(config.palette == 0);  // released before
  std::memcpy(&config, from, 64);
  require(config.palette == 1 && config.first_row == 0);
  for (const uint8_t byte : config.reserved) require(byte == 0);
  for (int i = 0; i < 16; ++i) {
    require((config.rows[i] == 0) == (config.row_bytes[i] == 0));
    require(i < 8 ? config.rows[i] <= 16 && config.row_bytes[i] <= 64 : config.rows[i] == 0);
  }
  std::memset(tiles, 0, sizeof(tiles));
}
inline void release() { config = Config{}; }
inline void zero(int tile) {
  require(configured(tile));
  std::memset(tiles[tile], 0, sizeof(tiles[tile]));
}
inline void load_tile(int tile, const void* from, int64_t stride) {
  zero(tile);
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(tiles[tile][row], static_cast<const char*>(from) + row * stride, config.row_bytes[tile]);
}
inline void store_tile(int tile, void* to, int64_t stride) {
  require(configured(tile));
  for (int row = 0; row < config.rows[tile]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[tile][row], config.row_bytes[tile]);
}
// TDPBSUD: sums += products of four signed bytes of `a` with four unsigned ones of `b`.
inline void dot_tiles(int sums, int a, int b) {
  require(configured(sums) && configured(a) && configured(b) && sums != a && sums != b && a != b);
  require(config.rows[sums] == config.rows[a] && config.row_bytes[sums] == config.row_bytes[b]);
  require(config.row_bytes[a] == 4 * config.rows[b] && config.row_bytes[sums] % 4 == 0);
  for (int m = 0; m < config.rows[sums]; ++m)
    for (int k = 0; k < config.rows[b]; ++k)
      for (int n = 0; n < config.row_bytes[sums] / 4; ++n) {
        int32_t sum;
        std::memcpy(&sum, &tiles[sums][m][4 * n], 4);
        for (int i = 0; i < 4; ++i) sum += int8_t(tiles[a][m][4 * k + i]) * tiles[b][k][4 * n + i];
        std::memcpy(&tiles[sums][m][4 * n], &sum, 4);
      }
}

}  // namespace emulated

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbsud
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_zero emulated::zero
#define _tile_loadd emulated::load_tile
#define _tile_stored emulated::store_tile
#define _tile_dpbsud emulated::dot_tiles
#define __AMX_INT8__ 1
