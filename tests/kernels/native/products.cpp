// Compares the products of instruction sets with plain loops, on the machine or the emulator that runs this program.
//
//   products               every set that this program was linked with: sums of integers bit by bit, for odd shapes, of
//                          every quantised format and of bfloat16
//   products SET FORMAT TOKENS ROUNDS   only computes, to count instructions: 32 outputs by 4,096 inputs
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../../../csrc/kernels.h"

using namespace xv;

namespace {

struct Set {
  const char* name;
  const Kernels* table;
};

const Set kSets[] = {XV_SETS};  // by the command that compiles this

std::mt19937 generator(1);

int random_int(int low, int high) { return std::uniform_int_distribution<int>(low, high)(generator); }

// Formats in the order that they are checked in.
const int kFormats[] = {4, 8, kTable2, kTable3, kTable4};

// A row of tiles whose scales are powers of two, so that float sums of scaled integers are exact.
std::vector<uint8_t> random_tiles(int format, int groups, int group) {
  std::vector<uint8_t> tiles(size_t(row_bytes(format, groups * group, group)));
  for (uint8_t& byte : tiles) byte = uint8_t(random_int(0, 3) == 0 ? 255 * random_int(0, 1) : random_int(0, 255));
  if (is_table(format)) {
    // The smallest and the largest, and any between them: all bytes, or a span of 127.
    const int count = 1 << bits_of(format), kind = random_int(0, 2);
    const int low = kind == 0 ? -128 : kind == 1 ? -69 : 0, high = kind == 0 ? 127 : low + 127;
    int8_t entries[16];
    for (int i = 0; i < count; ++i) entries[i] = int8_t(i == 0 ? low : i == 1 ? high : random_int(low, high));
    std::sort(entries, entries + count);
    for (int i = count; i < 16; ++i) entries[i] = entries[i - count];
    std::memcpy(tiles.data(), entries, 16);
  }
  for (int g = 0; g < groups; ++g)
    for (int r = 0; r < kTileRows; ++r) {
      const uint16_t scale = to_bfloat16((r % 2 ? -1.0f : 1.0f) * float(1 << (r % 2)));
      std::memcpy(&tiles[size_t(head_bytes(format) + g * tile_bytes(format, group) + 2 * r)], &scale, 2);
    }
  return tiles;
}

// Output r's integer of input k, from the layout that kernels/tiles.py describes.
int weight_of(const uint8_t* row, int format, int group, int r, int k) {
  const int byte = r % 16 * 4 + k % 4, half = r / 16, step = k % group / 4;  // steps of four inputs
  const uint8_t* values = row + head_bytes(format) + k / group * tile_bytes(format, group) + kScaleBytes;
  if (format == 8) return values[128 * step + 64 * half + byte] - 128;
  if (format == 4) return (values[64 * step + byte] >> (4 * half) & 15) - 8;
  const auto* entries = reinterpret_cast<const int8_t*>(row);
  if (format == kTable4) return entries[values[64 * step + byte] >> (4 * half) & 15];
  if (format == kTable2) return entries[values[64 * (step / 2) + byte] >> (4 * (step % 2) + 2 * half) & 3];
  const uint8_t* unit = values + 192 * (step / 4);
  if (step % 4 < 3) return entries[unit[64 * (step % 4) + byte] >> (4 * half) & 7];
  int index = 0;
  for (int bit = 0; bit < 3; ++bit) index |= (unit[64 * bit + byte] >> (4 * half + 3) & 1) << bit;
  return entries[index];
}

struct Inputs {
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  Inputs(const Kernels& table, const std::vector<float>& x, int count, int inputs, int group, int format)
      : values(size_t(inputs) * count), scales(size_t(inputs / group) * count), offsets(scales.size()) {
    table.quantize(x.data(), kFloat32, inputs, count, inputs, group, bias_of(format), values.data(), scales.data(),
                   offsets.data());
  }
  Tokens tokens(int count) const { return {count, values.data(), scales.data(), offsets.data()}; }
};

bool check(const Set& set, int format, int group, int groups, int count) {
  const int inputs = group * groups;
  const std::vector<uint8_t> tiles = random_tiles(format, groups, group);
  std::vector<float> x(size_t(count) * inputs);
  // Integers with 127 in each group: quantising keeps them.
  for (float& value : x) value = float(random_int(0, 2) == 0 ? 254 * random_int(0, 1) - 127 : random_int(-127, 127));
  for (size_t i = 0; i < x.size(); i += size_t(group)) x[i] = 127;
  const Inputs own(*set.table, x, count, inputs, group, format);
  std::vector<float> out(size_t(count) * kTileRows, -1.0f);
  row_product(*set.table, format)(tiles.data(), own.tokens(count), inputs, group, out.data());
  for (int t = 0; t < count; ++t)
    for (int r = 0; r < kTileRows; ++r) {
      double exact = 0;
      for (int g = 0; g < groups; ++g) {
        int64_t sum = 0;
        for (int k = g * group; k < (g + 1) * group; ++k)
          sum += int64_t(weight_of(tiles.data(), format, group, r, k)) * int(x[size_t(t) * inputs + k]);
        uint16_t scale;
        std::memcpy(&scale, &tiles[size_t(head_bytes(format) + g * tile_bytes(format, group) + 2 * r)], 2);
        exact += double(sum) * to_float(scale);
      }
      if (double(out[size_t(t) * kTileRows + r]) != exact) {
        std::printf("%s: format %d, group %d, %d groups, %d tokens: token %d row %d is %.1f instead of %.1f\n", set.name,
                    format, group, groups, count, t, r, double(out[size_t(t) * kTileRows + r]), exact);
        return false;
      }
    }
  return true;
}

// Integers, whose sums are exact in any order.
bool check_bf16(const Set& set, int rows, int inputs, int count) {
  std::vector<uint16_t> w(size_t(rows) * inputs), x(size_t(count) * inputs);
  for (uint16_t& value : w) value = to_bfloat16(float(random_int(-9, 9)));
  for (uint16_t& value : x) value = to_bfloat16(float(random_int(-9, 9)));
  std::vector<float> out(size_t(count) * rows, -1.0f);
  set.table->dot_bf16(w.data(), rows, x.data(), count, inputs, out.data());
  for (int t = 0; t < count; ++t)
    for (int r = 0; r < rows; ++r) {
      float exact = 0;
      for (int k = 0; k < inputs; ++k) exact += to_float(w[size_t(r) * inputs + k]) * to_float(x[size_t(t) * inputs + k]);
      if (out[size_t(t) * rows + r] != exact) {
        std::printf("%s: bfloat16, %d rows of %d, token %d of %d, row %d is %.1f instead of %.1f\n", set.name, rows, inputs,
                    t, count, r, double(out[size_t(t) * rows + r]), double(exact));
        return false;
      }
    }
  return true;
}

}  // namespace

int main(int count, char** words) {
  if (count == 5) {
    const int format = std::atoi(words[2]), tokens = std::atoi(words[3]), rounds = std::atoi(words[4]);
    for (const Set& set : kSets) {
      if (std::strcmp(set.name, words[1]) != 0) continue;
      const int group = is_table(format) ? 64 : 128;
      std::vector<uint8_t> tiles = random_tiles(format, 4096 / group, group);
      for (int i = 0; i < 16 && is_table(format); ++i) tiles[size_t(i)] = uint8_t(i);
      const std::vector<float> x(size_t(4096) * tokens, 1.0f);
      const Inputs inputs(*set.table, x, tokens, 4096, group, format);
      std::vector<float> out(size_t(tokens) * kTileRows);
      for (int i = 0; i < rounds; ++i)
        row_product(*set.table, format)(tiles.data(), inputs.tokens(tokens), 4096, group, out.data());
      return 0;
    }
    return 2;
  }
  for (const Set& set : kSets) {
    int checked = 0;
    for (const int format : kFormats)
      for (const int group : {32, 64, 128})
        for (const int groups : {1, 3})
          for (int tokens = 1; tokens <= set.table->block; ++tokens, ++checked)
            if (!check(set, format, group, groups, tokens)) return 1;
    for (const int rows : {1, 7, 24})
      for (const int inputs : {5, 64, 203})
        for (int tokens = 1; tokens <= 8; ++tokens, ++checked)
          if (!check_bf16(set, rows, inputs, tokens)) return 1;
    std::printf("%s: %d shapes equal\n", set.name, checked);
  }
  return 0;
}
