// Products with plain weights, bfloat16 or float32, and those of LoRA adapters, for any instruction set; in an unnamed
// namespace, as generic.h. The order of a sum depends on the number of inputs alone: a token's bits are the same in any
// company.
#pragma once

#include <cstring>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace {

using namespace xv;

// 2 * kWidth values as two vectors. Those of bfloat16 pairs are the values 0, 2, 4 … and 1, 3, 5 …: faster than widening
// them in order.
inline void load_two(const float* from, Lanes& first, Lanes& second) {
  first = load_lanes(from);
  second = load_lanes(from + kWidth);
}
inline void load_two(const uint16_t* from, Lanes& first, Lanes& second) {
  IntLanes pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  first = Lanes(pairs << 16);
  second = Lanes(pairs & int32_t(0xffff0000));
}
inline float value_of(float x) { return x; }
inline float value_of(uint16_t x) { return to_float(x); }

constexpr int kBlockInputs = 512;  // with many tokens: four of them, and a few rows, fit in the L1 cache
constexpr int kTile = 4;           // tokens of a tile if there are many

// Adds to sums [tokens, rows] the products of the inputs begin to end - 1: kRows rows of w times kCount tokens, as floats
// in the order of load_two.
template <class Stored, int kCount, int kRows>
void dot_lanes(const Stored* w, const float* x, int inputs, int begin, int end, Lanes* total, int rows) {
  Lanes sums[kRows][kCount];
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kCount; ++t) sums[r][t] = begin == 0 ? Lanes{} : total[t * rows + r];
  for (int k = begin; k < end; k += 2 * kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const Stored* from = w + int64_t(r) * inputs + k;
      Lanes first, second;
      load_two(from, first, second);
      __builtin_prefetch(from + 2048 / sizeof(Stored));
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const float* token = x + int64_t(t) * inputs + k;
        sums[r][t] += first * load_lanes(token);
        sums[r][t] += second * load_lanes(token + kWidth);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kCount; ++t) total[t * rows + r] = sums[r][t];
}

template <class Stored, int kCount>
void dot_lanes_rows(const Stored* w, int rows, const float* x, int inputs, int begin, int end, Lanes* total) {
  constexpr int kRows = kCount <= 2 ? 4 : kCount <= 4 ? 3 : kCount <= 6 ? 2 : 1;
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_lanes<Stored, kCount, kRows>(w + int64_t(r) * inputs, x, inputs, begin, end, total + r, rows);
  for (; r < rows; ++r)
    dot_lanes<Stored, kCount, 1>(w + int64_t(r) * inputs, x, inputs, begin, end, total + r, rows);
}

// A sum over the lanes, and the inputs from `wide` on.
template <class Stored>
__attribute__((noinline)) float finish(Lanes sums, const Stored* w, const float* x, int wide, int inputs) {
  float sum = sum_of(sums);
  for (int k = wide; k < inputs; ++k) sum += value_of(w[k]) * x[k];
  return sum;
}

template <class Stored>
void dot_of(const Stored* w, int rows, const Stored* x, int count, int inputs, float* out) {
  const int wide = inputs / (2 * kWidth) * (2 * kWidth);
  thread_local std::vector<float> memory;
  const float* floats;
  if constexpr (sizeof(Stored) == 4) {
    floats = x;
  } else {
    if (memory.size() < size_t(count) * size_t(inputs)) memory.resize(size_t(count) * size_t(inputs));
    floats = memory.data();
    for (int t = 0; t < count; ++t) {
      const Stored* token = x + int64_t(t) * inputs;
      float* to = memory.data() + int64_t(t) * inputs;
      for (int k = 0; k < wide; k += 2 * kWidth) {
        Lanes first, second;
        load_two(token + k, first, second);
        store_lanes(to + k, first);
        store_lanes(to + k + kWidth, second);
      }
      for (int k = wide; k < inputs; ++k) to[k] = value_of(token[k]);
    }
  }
  thread_local std::vector<Lanes> total;
  if (total.size() < size_t(count) * size_t(rows)) total.resize(size_t(count) * size_t(rows));
  using Dot = void (*)(const Stored*, int, const float*, int, int, int, Lanes*);
  constexpr Dot dots[] = {dot_lanes_rows<Stored, 1>, dot_lanes_rows<Stored, 2>, dot_lanes_rows<Stored, 3>,
                          dot_lanes_rows<Stored, 4>, dot_lanes_rows<Stored, 5>, dot_lanes_rows<Stored, 6>,
                          dot_lanes_rows<Stored, 7>, dot_lanes_rows<Stored, 8>};
  const int width = count <= 8 ? count : kTile, step = count <= 8 ? wide : kBlockInputs;
  for (int begin = 0; begin < wide || begin == 0; begin += step) {
    const int end = begin + step < wide ? begin + step : wide;
    for (int t = 0; t < count; t += width) {
      const int tokens = count - t < width ? count - t : width;
      dots[tokens - 1](w, rows, floats + int64_t(t) * inputs, inputs, begin, end, total.data() + int64_t(t) * rows);
    }
    if (step == 0) break;
  }
  for (int t = 0; t < count; ++t)
    for (int r = 0; r < rows; ++r)
      out[t * rows + r] = finish(total[size_t(t) * rows + r], w + int64_t(r) * inputs, floats + int64_t(t) * inputs, wide, inputs);
}

[[maybe_unused]] void generic_dot_bf16(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs,
                                       float* out) {
  dot_of(w, rows, x, count, inputs, out);
}
[[maybe_unused]] void generic_dot_f32(const float* w, int rows, const float* x, int count, int inputs, float* out) {
  dot_of(w, rows, x, count, inputs, out);
}

inline void save_lanes(float* to, Lanes x) { store_lanes(to, x); }
inline void save_lanes(uint16_t* to, Lanes x) {
  float values[kWidth];
  store_lanes(values, x);
  for (int i = 0; i < kWidth; ++i) to[i] = to_bfloat16(values[i]);
}
inline void save_value(float* to, float x) { *to = x; }
inline void save_value(uint16_t* to, float x) { *to = to_bfloat16(x); }

template <class Stored>
void expand_of(const Stored* b, const float* down, int rank, int64_t outputs, Stored* y, int count) {
  int n = 0;
  for (; n + kWidth <= count; n += kWidth) {
    Lanes sum = {};
    for (int r = 0; r < rank; ++r) sum += down[r] * load_lanes(b + r * outputs + n);
    save_lanes(y + n, load_lanes(y + n) + sum);
  }
  for (; n < count; ++n) {
    float sum = 0;
    for (int r = 0; r < rank; ++r) sum += down[r] * value_of(b[r * outputs + n]);
    save_value(y + n, value_of(y[n]) + sum);
  }
}

[[maybe_unused]] void generic_expand(const void* b, Type type, const float* down, int rank, int64_t outputs, void* y,
                                     int count) {
  if (type == kFloat32)
    expand_of(static_cast<const float*>(b), down, rank, outputs, static_cast<float*>(y), count);
  else
    expand_of(static_cast<const uint16_t*>(b), down, rank, outputs, static_cast<uint16_t*>(y), count);
}

}  // namespace
