// Weights from rows to tiles and back (xverse_kernels.h); unpack.h describes the layouts.
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "unpack.h"
#include "xverse_kernels.h"
#if defined(__linux__)
#include <unistd.h>
#endif

using namespace xv;

namespace {

void use_large_pages(void* memory, int64_t size) {
#if defined(__linux__)
  // Only with plenty of free memory. Otherwise the kernel has to compact memory for each huge page, which is slower
  // than 512 small ones.
  constexpr int64_t kPlenty = int64_t(4) << 30;
  if (int64_t(sysconf(_SC_AVPHYS_PAGES)) * sysconf(_SC_PAGESIZE) > size + kPlenty) xv_use_huge_pages(memory, size);
#else
  (void)memory, (void)size;
#endif
}

// Indices of one step of four inputs by 32 outputs: outputs 0 to 15 first, four bytes each.
struct Step {
  uint8_t first[64], second[64];
};

// The steps of a unit to its lines, and back. The loops vectorise.
template <int kBits>
void pack_unit(const Step* steps, uint8_t* to) {
  for (int i = 0; i < 64; ++i) {
    if constexpr (kBits == 2) {
      to[i] = uint8_t(steps[0].first[i] | steps[0].second[i] << 2 | steps[1].first[i] << 4 | steps[1].second[i] << 6);
    } else if constexpr (kBits == 4) {
      to[i] = uint8_t(steps[0].first[i] | steps[0].second[i] << 4);
    } else {
      const int last = steps[3].first[i] << 3 | steps[3].second[i] << 7, next = last >> 1, third = last >> 2;
      to[i] = uint8_t(steps[0].first[i] | steps[0].second[i] << 4 | (last & 0x88));
      to[64 + i] = uint8_t(steps[1].first[i] | steps[1].second[i] << 4 | (next & 0x88));
      to[128 + i] = uint8_t(steps[2].first[i] | steps[2].second[i] << 4 | (third & 0x88));
    }
  }
}

template <int kBits>
void unpack_unit(const uint8_t* from, Step* steps) {
  for (int i = 0; i < 64; ++i) {
    const int a = from[i];
    if constexpr (kBits == 2) {
      steps[0].first[i] = a & 3, steps[0].second[i] = a >> 2 & 3;
      steps[1].first[i] = a >> 4 & 3, steps[1].second[i] = uint8_t(a >> 6);
    } else if constexpr (kBits == 4) {
      steps[0].first[i] = a & 15, steps[0].second[i] = uint8_t(a >> 4);
    } else {
      const int b = from[64 + i], c = from[128 + i];
      steps[0].first[i] = a & 7, steps[0].second[i] = a >> 4 & 7;
      steps[1].first[i] = b & 7, steps[1].second[i] = b >> 4 & 7;
      steps[2].first[i] = c & 7, steps[2].second[i] = c >> 4 & 7;
      steps[3].first[i] = uint8_t((a >> 3 & 1) | (b >> 2 & 2) | (c >> 1 & 4));
      steps[3].second[i] = uint8_t((a >> 7) | (b >> 6 & 2) | (c >> 5 & 4));
    }
  }
}

constexpr int kInputs = 256;  // of the rows of a tile, unpacked at a time; a multiple of the group

// `count` indices of a row, as bytes.
template <int kBits>
void indices_of(const uint8_t* row, int64_t inputs, int64_t start, int64_t count, uint8_t* to) {
  if constexpr (kBits == 4) {
    for (int64_t k = 0; k < count / 2; ++k) to[2 * k] = row[start / 2 + k] & 15, to[2 * k + 1] = row[start / 2 + k] >> 4;
    return;
  }
  for (int64_t k = 0; k < count / 4; ++k)
    for (int i = 0; i < 4; ++i) to[4 * k + i] = row[start / 4 + k] >> (2 * i) & 3;
  if constexpr (kBits == 3) {
    const uint8_t* plane = row + inputs / 4;
    for (int64_t k = 0; k < count / 8; ++k)
      for (int i = 0; i < 8; ++i) to[8 * k + i] |= uint8_t((plane[start / 8 + k] >> i & 1) << 2);
  }
}

template <int kBits>
void tile_table(const uint8_t* rows, const uint16_t* scales, const int8_t* table, uint8_t* tiles, int64_t outputs,
                int64_t inputs, int group, int threads) {
  constexpr int kFormat = kTable + kBits, kUnit = unit_steps(kFormat);
  const int64_t groups = inputs / group, size = row_bytes(kFormat, inputs, group), stored = inputs * kBits / 8;
  share((outputs + kTileRows - 1) / kTileRows, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t part[kTileRows][kInputs + 64];  // the stride is not a power of two: rows would share a cache set
    Step steps[kUnit];
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* to = tiles + row * size;
      std::memset(to, 0, kTableBytes);
      for (int i = 0; i < 16; ++i) to[i] = uint8_t(table[i % (1 << kBits)]);
      to += kTableBytes;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t inside = g * group % kInputs;
        for (int r = 0; r < kTileRows; ++r, to += 2) {
          const int64_t output = row * kTileRows + r;
          const uint16_t scale = output < outputs ? scales[output * groups + g] : 0;
          std::memcpy(to, &scale, 2);
          if (inside == 0)
            indices_of<kBits>(rows + (output < outputs ? output : 0) * stored, inputs, g * group,
                              inputs - g * group < kInputs ? inputs - g * group : kInputs, part[r]);
        }
        for (int64_t k = inside; k < inside + group; to += 64 * unit_lines(kFormat)) {
          for (int step = 0; step < kUnit; ++step, k += 4)
            for (int r = 0; r < 16; ++r) {
              std::memcpy(steps[step].first + 4 * r, part[r] + k, 4);
              std::memcpy(steps[step].second + 4 * r, part[16 + r] + k, 4);
            }
          pack_unit<kBits>(steps, to);
        }
      }
    }
  });
}

template <int kBits, class Value>
void dequantize_table(const uint8_t* tiles, Value* weight, int64_t outputs, int64_t inputs, int group, int threads) {
  constexpr int kFormat = kTable + kBits, kUnit = unit_steps(kFormat);
  const int64_t groups = inputs / group, size = row_bytes(kFormat, inputs, group);
  share((outputs + kTileRows - 1) / kTileRows, threads, [&](int64_t begin, int64_t end) {
    Step steps[kUnit];
    Value entries[kTileRows][1 << kBits], values[kTileRows][kLargestGroup];  // each output's weights: by index, of a group
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t *table = tiles + row * size, *from = table + kTableBytes;
      for (int64_t g = 0; g < groups; ++g) {
        for (int r = 0; r < kTileRows; ++r, from += 2) {
          uint16_t scale;
          std::memcpy(&scale, from, 2);
          for (int i = 0; i < 1 << kBits; ++i) {
            const float value = float(int8_t(table[i])) * to_float(scale);
            if constexpr (sizeof(Value) == 4)
              entries[r][i] = value;
            else
              entries[r][i] = to_bfloat16(value);
          }
        }
        for (int k = 0; k < group; from += 64 * unit_lines(kFormat)) {
          unpack_unit<kBits>(from, steps);
          for (int step = 0; step < kUnit; ++step, k += 4)
            for (int i = 0; i < 64; ++i) {
              values[i / 4][k + i % 4] = entries[i / 4][steps[step].first[i]];
              values[16 + i / 4][k + i % 4] = entries[16 + i / 4][steps[step].second[i]];
            }
        }
        const int64_t left = outputs - row * kTileRows;
        for (int r = 0; r < (left < kTileRows ? left : kTileRows); ++r)
          std::memcpy(weight + (row * kTileRows + r) * inputs + g * group, values[r], sizeof(Value) * size_t(group));
      }
    }
  });
}

// Calls function(std::integral_constant) with the bits of a format.
template <class Function>
void with_bits(int format, const Function& function) {
  if (bits_of(format) == 2) function(std::integral_constant<int, 2>());
  else if (bits_of(format) == 3) function(std::integral_constant<int, 3>());
  else function(std::integral_constant<int, 4>());
}

}  // namespace

extern "C" {

void xv_tile(const uint8_t* rows, const uint16_t* scales, const int8_t* table, uint8_t* tiles, int64_t outputs,
             int64_t inputs, int format, int group, int threads) {
  use_large_pages(tiles, (outputs + kTileRows - 1) / kTileRows * row_bytes(format, inputs, group));
  if (is_table(format))
    return with_bits(format, [&](auto bits) {
      tile_table<bits>(rows, scales, table, tiles, outputs, inputs, group, threads);
    });
  const int bits = format;
  const int64_t groups = inputs / group, row_bytes = inputs * bits / 8, tile_bytes = xv::tile_bytes(format, group);
  constexpr int64_t kPart = 2048;  // bytes of each row to copy at a time
  const int64_t group_bytes = int64_t(group) * bits / 8, part_groups = kPart / group_bytes;
  share((outputs + kTileRows - 1) / kTileRows, threads, [&](int64_t begin, int64_t end) {
    alignas(64) uint8_t part[kTileRows][kPart + 64];  // the stride is not a power of two: rows would share a cache set
    for (int64_t row = begin; row < end; ++row) {
      uint8_t* tile = tiles + row * groups * tile_bytes;
      for (int64_t g = 0; g < groups; ++g, tile += tile_bytes) {
        const int64_t inside = g % part_groups;
        if (inside == 0) {
          // Long runs of one row at a time: reading group by group would fetch one or two lines of each row, all of
          // which map to one set of the cache.
          const int64_t left = (groups - g) * group_bytes, length = left < kPart ? left : kPart;
          for (int r = 0; r < kTileRows; ++r) {
            const int64_t output = row * kTileRows + r < outputs ? row * kTileRows + r : 0;
            std::memcpy(part[r], rows + output * row_bytes + g * group_bytes, length);
          }
        }
        for (int r = 0; r < kTileRows; ++r) {
          const int64_t output = row * kTileRows + r;
          const uint16_t scale = output < outputs ? scales[output * groups + g] : 0;
          std::memcpy(tile + 2 * r, &scale, 2);
        }
        uint8_t* to = tile + kScaleBytes;
        const int64_t from = inside * group_bytes;
        if (bits == 8) {
          for (int k = 0; k < group; k += 4, to += 128)
            for (int r = 0; r < kTileRows; ++r) std::memcpy(to + 4 * r, part[r] + from + k, 4);
          continue;
        }
        // Transposing first, then spreading 16 rows at a time, vectorises: six times as fast as doing both at once.
        uint16_t pairs[kLargestGroup / 4][kTileRows];  // each row's bytes of four inputs
        for (int k = 0; k < group / 4; ++k)
          for (int r = 0; r < kTileRows; ++r) std::memcpy(&pairs[k][r], part[r] + from + 2 * k, 2);
        for (int k = 0; k < group / 4; ++k, to += 64) {
          uint32_t four[16];
          for (int r = 0; r < 16; ++r) {
            // The four nibbles of one row become the low nibbles of four bytes, those of the other row the high ones.
            const uint32_t low = pairs[k][r], high = pairs[k][r + 16];
            four[r] = (low & 15) | (low & 0xf0) << 4 | (low & 0xf00) << 8 | (low & 0xf000) << 12 |
                      (high & 15) << 4 | (high & 0xf0) << 8 | (high & 0xf00) << 12 | (high & 0xf000) << 16;
          }
          std::memcpy(to, four, 64);
        }
      }
    }
  });
}

void xv_dequantize(const uint8_t* tiles, void* weight, int type, int64_t outputs, int64_t inputs, int format,
                   int group, int threads) {
  if (is_table(format))
    return with_bits(format, [&](auto bits) {
      if (type == kFloat32)
        dequantize_table<bits>(tiles, static_cast<float*>(weight), outputs, inputs, group, threads);
      else
        dequantize_table<bits>(tiles, static_cast<uint16_t*>(weight), outputs, inputs, group, threads);
    });
  const int bits = format;
  const int64_t groups = inputs / group, tile_bytes = xv::tile_bytes(format, group);
  const int size = int(size_of(type)), halves = bits == 8 ? 2 : 1;
  const float bias = bits == 8 ? 128 : 8;
  share((outputs + kTileRows - 1) / kTileRows, threads, [&](int64_t begin, int64_t end) {
    // Collects one tile's values, because rows of the weight itself may map to one set of the cache.
    alignas(64) char values[kTileRows][kLargestGroup * 4];
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* tile = tiles + row * groups * tile_bytes;
      for (int64_t g = 0; g < groups; ++g, tile += tile_bytes) {
        for (int half = 0; half < 2; ++half) {
          float scales[64];  // each row's scale four times
          for (int i = 0; i < 64; ++i) {
            uint16_t scale;
            std::memcpy(&scale, tile + 2 * (16 * half + i / 4), 2);
            scales[i] = to_float(scale);
          }
          for (int k = 0; k < group; k += 4) {
            const uint8_t* from = tile + kScaleBytes + (k / 4 * halves + (bits == 8 ? half : 0)) * 64;
            float wide[64];
            uint16_t narrow[64];
            if (bits == 8)
              for (int i = 0; i < 64; ++i) wide[i] = (float(from[i]) - bias) * scales[i];
            else if (half == 0)
              for (int i = 0; i < 64; ++i) wide[i] = (float(from[i] & 15) - bias) * scales[i];
            else
              for (int i = 0; i < 64; ++i) wide[i] = (float(from[i] >> 4) - bias) * scales[i];
            const char* made = reinterpret_cast<const char*>(wide);
            if (type != kFloat32) {
              for (int i = 0; i < 64; ++i) narrow[i] = to_bfloat16(wide[i]);
              made = reinterpret_cast<const char*>(narrow);
            }
            for (int r = 0; r < 16; ++r)
              std::memcpy(values[16 * half + r] + k * size, made + 4 * r * size, 4 * size);
          }
        }
        const int64_t left = outputs - row * kTileRows;
        for (int r = 0; r < (left < kTileRows ? left : kTileRows); ++r)
          std::memcpy(static_cast<char*>(weight) + ((row * kTileRows + r) * inputs + g * group) * size, values[r],
                      group * size);
      }
    }
  });
}

}  // extern "C"
