// Every kernel in plain C++ that compilers vectorise. In an unnamed namespace: each translation unit that includes this
// file has its own copy, compiled with its own flags.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

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

}  // namespace
