// Compares the products of instruction sets with plain loops, on the machine or the emulator that runs this program.
//
//   products               every set that this program was linked with: sums of integers bit by bit, for odd shapes
//   products SET BITS TOKENS ROUNDS   only computes, to count instructions: 32 outputs by 4,096 inputs
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

// A row of tiles whose scales are powers of two, so that float sums of scaled integers are exact.
std::vector<uint8_t> random_tiles(int bits, int groups, int group) {
  const int tile_bytes = kScaleBytes + 4 * bits * group;
  std::vector<uint8_t> tiles(size_t(groups) * tile_bytes);
  for (uint8_t& byte : tiles) byte = uint8_t(random_int(0, 3) == 0 ? 255 * random_int(0, 1) : random_int(0, 255));
  for (int g = 0; g < groups; ++g)
    for (int r = 0; r < kTileRows; ++r) {
      const uint16_t scale = to_bfloat16((r % 2 ? -1.0f : 1.0f) * float(1 << (r % 3)));
      std::memcpy(&tiles[size_t(g) * tile_bytes + 2 * r], &scale, 2);
    }
  return tiles;
}

// Row r's stored value of input k, without its offset.
int weight_of(const uint8_t* tile, int bits, int r, int k) {
  const uint8_t* four = tile + kScaleBytes + k / 4 * 16 * bits;
  if (bits == 8) return four[(r / 16) * 64 + r % 16 * 4 + k % 4] - 128;
  const int byte = four[r % 16 * 4 + k % 4];
  return (r < 16 ? byte & 15 : byte >> 4) - 8;
}

struct Inputs {
  std::vector<int8_t> values;
  std::vector<float> scales;
  std::vector<int32_t> offsets;

  Inputs(const Kernels& table, const std::vector<float>& x, int count, int inputs, int group, int bits)
      : values(size_t(inputs) * count), scales(size_t(inputs / group) * count), offsets(scales.size()) {
    table.quantize(x.data(), kFloat32, inputs, count, inputs, group, bits == 4 ? 8 : 128, values.data(), scales.data(),
                   offsets.data());
  }
  Tokens tokens(int count) const { return {count, values.data(), scales.data(), offsets.data()}; }
};

bool check(const Set& set, int bits, int group, int groups, int count) {
  const int inputs = group * groups;
  const std::vector<uint8_t> tiles = random_tiles(bits, groups, group);
  std::vector<float> x(size_t(count) * inputs);
  // Integers with 127 in each group: quantising keeps them.
  for (float& value : x) value = float(random_int(0, 2) == 0 ? 254 * random_int(0, 1) - 127 : random_int(-127, 127));
  for (size_t i = 0; i < x.size(); i += size_t(group)) x[i] = 127;
  const Inputs own(*set.table, x, count, inputs, group, bits);
  std::vector<float> out(size_t(count) * kTileRows, -1.0f);
  const auto tile_row = bits == 4 ? set.table->tile_row4 : set.table->tile_row8;
  tile_row(tiles.data(), own.tokens(count), inputs, group, out.data());
  for (int t = 0; t < count; ++t)
    for (int r = 0; r < kTileRows; ++r) {
      double exact = 0;
      for (int g = 0; g < groups; ++g) {
        const uint8_t* tile = tiles.data() + size_t(g) * (kScaleBytes + 4 * bits * group);
        int64_t sum = 0;
        for (int k = 0; k < group; ++k)
          sum += int64_t(weight_of(tile, bits, r, k)) * int(x[size_t(t) * inputs + g * group + k]);
        uint16_t scale;
        std::memcpy(&scale, tile + 2 * r, 2);
        exact += double(sum) * to_float(scale);
      }
      if (double(out[size_t(t) * kTileRows + r]) != exact) {
        std::printf("%s: bits %d, group %d, %d groups, %d tokens: token %d row %d is %.1f instead of %.1f\n", set.name,
                    bits, group, groups, count, t, r, double(out[size_t(t) * kTileRows + r]), exact);
        return false;
      }
    }
  return true;
}

}  // namespace

int main(int count, char** words) {
  if (count == 5) {
    const int bits = std::atoi(words[2]), tokens = std::atoi(words[3]), rounds = std::atoi(words[4]);
    for (const Set& set : kSets) {
      if (std::strcmp(set.name, words[1]) != 0) continue;
      const std::vector<uint8_t> tiles = random_tiles(bits, 32, 128);
      const std::vector<float> x(size_t(4096) * tokens, 1.0f);
      const Inputs inputs(*set.table, x, tokens, 4096, 128, bits);
      std::vector<float> out(size_t(tokens) * kTileRows);
      for (int i = 0; i < rounds; ++i)
        (bits == 4 ? set.table->tile_row4 : set.table->tile_row8)(tiles.data(), inputs.tokens(tokens), 4096, 128,
                                                                  out.data());
      return 0;
    }
    return 2;
  }
  for (const Set& set : kSets) {
    int checked = 0;
    for (const int bits : {4, 8})
      for (const int group : {32, 64, 128})
        for (const int groups : {1, 3})
          for (int tokens = 1; tokens <= kMaxTokens; ++tokens, ++checked)
            if (!check(set, bits, group, groups, tokens)) return 1;
    std::printf("%s: %d shapes equal\n", set.name, checked);
  }
  return 0;
}
