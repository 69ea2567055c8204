// Weights of a tile as bytes in registers, for any instruction set and format. In an unnamed namespace, as generic.h.
//
// Formats store steps of four inputs by 32 outputs; a unit of a few steps has whole lines of 64 bytes:
//   8 bits     one step in two lines, the second for outputs 16 to 31
//   4 bits     one step in a line, outputs 0 to 15 in the low nibbles
//   2 bits     two steps in a line: a nibble has a step, outputs 0 to 15 in its low bits
//   3 bits     four steps in three lines: each line has a step as 4 bits have it, and the fourth bits of the nibbles are the
//              three bits of the last step's indices
// so that a table of 16 entries looks up a nibble as it is: entries repeat where a nibble has a bit or two of others.
#pragma once

#include <cstring>

#include "kernels.h"

namespace {

using namespace xv;

constexpr int unit_steps(int format) { return format == kTable2 ? 2 : format == kTable3 ? 4 : 1; }
constexpr int unit_lines(int format) { return unit_steps(format) * bits_of(format) / 4; }

// `V` describes the vectors of an instruction set: load, low and high (nibbles as weights), bytes (unsigned values as
// weights); for tables indices, high_indices (nibbles as indices), join (the last step of 3 bits as nibbles), Table,
// table (16 entries, and the smallest) and lookup.
template <class V, int kFormat>
struct Unpack {
  static constexpr int smallest = 0;
  explicit Unpack(const uint8_t*) {}
  // Weights of outputs 0 to 15 and 16 to 31, as many as a vector has, of step `step` of the unit at `w`.
  template <class Weights>
  void operator()(const uint8_t* w, int, Weights& first, Weights& second) const {
    const auto stored = V::load(w);
    if constexpr (kFormat == 4) {
      first = V::low(stored), second = V::high(stored);
    } else {
      first = V::bytes(stored), second = V::bytes(V::load(w + 64));
    }
  }
};

template <class V, int kFormat>
struct UnpackTable {
  typename V::Table first_table, second_table;
  int smallest = 127;
  explicit UnpackTable(const uint8_t* row) {
    int8_t first[16], second[16];
    std::memcpy(first, row, 16);
    for (int i = 0; i < 16; ++i) {
      second[i] = kFormat == kTable2 ? first[i / 4] : first[i];
      smallest = first[i] < smallest ? first[i] : smallest;
    }
    first_table = V::table(first, smallest), second_table = V::table(second, smallest);
  }
  template <class Weights>
  void operator()(const uint8_t* w, int step, Weights& first, Weights& second) const {
    if constexpr (kFormat == kTable2) {
      const auto stored = V::load(w);
      const auto nibbles = step == 0 ? V::indices(stored) : V::high_indices(stored);
      first = V::lookup(first_table, nibbles), second = V::lookup(second_table, nibbles);
    } else {
      const auto stored = kFormat == kTable3 && step == 3 ? V::join(V::load(w), V::load(w + 64), V::load(w + 128))
                                                          : V::load(w + 64 * step);
      first = V::lookup(first_table, V::indices(stored)), second = V::lookup(second_table, V::high_indices(stored));
    }
  }
};
template <class V>
struct Unpack<V, kTable2> : UnpackTable<V, kTable2> { using UnpackTable<V, kTable2>::UnpackTable; };
template <class V>
struct Unpack<V, kTable3> : UnpackTable<V, kTable3> { using UnpackTable<V, kTable3>::UnpackTable; };
template <class V>
struct Unpack<V, kTable4> : UnpackTable<V, kTable4> { using UnpackTable<V, kTable4>::UnpackTable; };

}  // namespace
