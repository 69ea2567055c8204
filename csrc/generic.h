// Every kernel in plain C++ that compilers vectorise. In an unnamed namespace: each translation unit that includes this
// file has its own copy, compiled with its own flags.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "kernels.h"
#include "lanes.h"

namespace {

using namespace xv;

inline void quantize_row(const float* x, int inputs, int group, int bias, int count, int8_t* values,
                         float* scales, int32_t* offsets) {
  for (int start = 0; start < inputs; start += group) {
    // As integers, magnitudes keep their order and NaN is the largest.
    uint32_t largest = 0;
    for (int k = 0; k < group; ++k) {
      uint32_t bits;
      std::memcpy(&bits, x + start + k, 4);
      bits &= 0x7fffffff;
      largest = bits > largest ? bits : largest;
    }
    float maximum;
    std::memcpy(&maximum, &largest, 4);
    const bool finite = largest < 0x7f800000;
    // Below the smallest normal number the reciprocal would overflow.
    const bool usable = finite && maximum > 127 * std::numeric_limits<float>::min();
    const float inverse = usable ? 127.0f / maximum : 0.0f;
    int32_t sum = 0;
    int8_t rounded[kLargestGroup];
    for (int k = 0; k < group; ++k) {
      rounded[k] = int8_t(nearest((usable ? x[start + k] : 0.0f) * inverse));
      sum += rounded[k];
    }
    for (int k = 0; k < group; k += 4) std::memcpy(values + int64_t(start + k) * count, rounded + k, 4);
    const int64_t at = int64_t(start / group) * count;
    scales[at] = finite ? (usable ? maximum / 127.0f : 0.0f) : std::numeric_limits<float>::quiet_NaN();
    offsets[at] = -bias * sum;
  }
}

// Token t's elements are at offset t in the block's arrays (4 * t bytes in `values`).
[[maybe_unused]] void generic_quantize(const void* x, Type type, int64_t stride, int count, int inputs,
                                       int group, int bias, int8_t* values, float* scales,
                                       int32_t* offsets) {
  constexpr int kPart = 1024;
  for (int t = 0; t < count; ++t) {
    for (int start = 0; start < inputs;) {
      const int size = inputs - start < kPart ? inputs - start : kPart;  // a multiple of the group
      float part[kPart];
      const float* row = static_cast<const float*>(x) + t * stride + start;
      if (type == kBFloat16) {
        const uint16_t* bits = static_cast<const uint16_t*>(x) + t * stride + start;
        for (int k = 0; k < size; ++k) part[k] = to_float(bits[k]);
        row = part;
      }
      const int64_t at = int64_t(start / group) * count + t;
      quantize_row(row, size, group, bias, count, values + (int64_t(start) * count + t * 4), scales + at,
                   offsets + at);
      start += size;
    }
  }
}

[[maybe_unused]] void generic_store(const float* from, void* to, Type type, int count) {
  if (type == kFloat32) {
    std::memcpy(to, from, sizeof(float) * count);
    return;
  }
  uint16_t* bits = static_cast<uint16_t*>(to);
  if (count == kTileRows) {  // a length known at compile time
    for (int i = 0; i < kTileRows; ++i) bits[i] = to_bfloat16(from[i]);
  } else {
    for (int i = 0; i < count; ++i) bits[i] = to_bfloat16(from[i]);
  }
}

// Values 0, 2, 4 … of bfloat16 pairs, and values 1, 3, 5 …: faster than widening them in order.
inline Lanes even_lanes(IntLanes pairs) { return Lanes(pairs << 16); }
inline Lanes odd_lanes(IntLanes pairs) { return Lanes(pairs & int32_t(0xffff0000)); }
inline IntLanes load_pairs(const uint16_t* from) {
  IntLanes pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  return pairs;
}

// kRows rows of w times kCount tokens as floats, whose even and odd values alternate by vectors up to `wide`. The order
// of a sum depends on neither count: a token's bits are the same in any company.
template <int kCount, int kRows>
void dot_lanes(const uint16_t* w, const float* x, int inputs, int wide, float* out, int out_stride) {
  Lanes sums[kRows][kCount] = {};
  for (int k = 0; k < wide; k += 2 * kWidth) {
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const uint16_t* from = w + int64_t(r) * inputs + k;
      const IntLanes pairs = load_pairs(from);
      __builtin_prefetch(from + 1024);
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const float* token = x + int64_t(t) * inputs + k;
        sums[r][t] += even_lanes(pairs) * load_lanes(token);
        sums[r][t] += odd_lanes(pairs) * load_lanes(token + kWidth);
      }
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kCount; ++t) {
      float sum = sum_of(sums[r][t]);
      for (int k = wide; k < inputs; ++k) sum += to_float(w[int64_t(r) * inputs + k]) * x[int64_t(t) * inputs + k];
      out[t * out_stride + r] = sum;
    }
}

template <int kCount>
void dot_lanes_rows(const uint16_t* w, int rows, const float* x, int inputs, int wide, float* out) {
  constexpr int kRows = kCount <= 2 ? 4 : kCount <= 4 ? 3 : kCount <= 6 ? 2 : 1;
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    dot_lanes<kCount, kRows>(w + int64_t(r) * inputs, x, inputs, wide, out + r, rows);
  for (; r < rows; ++r) dot_lanes<kCount, 1>(w + int64_t(r) * inputs, x, inputs, wide, out + r, rows);
}

[[maybe_unused]] void generic_dot_bf16(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs,
                                       float* out) {
  thread_local std::vector<float> memory;
  if (memory.size() < size_t(count) * size_t(inputs)) memory.resize(size_t(count) * size_t(inputs));
  float* floats = memory.data();
  const int wide = inputs / (2 * kWidth) * (2 * kWidth);
  for (int t = 0; t < count; ++t) {
    const uint16_t* token = x + int64_t(t) * inputs;
    float* to = floats + int64_t(t) * inputs;
    for (int k = 0; k < wide; k += 2 * kWidth) {
      const IntLanes pairs = load_pairs(token + k);
      store_lanes(to + k, even_lanes(pairs));
      store_lanes(to + k + kWidth, odd_lanes(pairs));
    }
    for (int k = wide; k < inputs; ++k) to[k] = to_float(token[k]);
  }
  using Dot = void (*)(const uint16_t*, int, const float*, int, int, float*);
  constexpr Dot dots[] = {dot_lanes_rows<1>, dot_lanes_rows<2>, dot_lanes_rows<3>, dot_lanes_rows<4>,
                          dot_lanes_rows<5>, dot_lanes_rows<6>, dot_lanes_rows<7>, dot_lanes_rows<8>};
  dots[count - 1](w, rows, floats, inputs, wide, out);
}

}  // namespace
