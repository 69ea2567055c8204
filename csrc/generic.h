// Every kernel in plain C++ that compilers vectorise. In an unnamed namespace: each translation unit that includes this
// file has its own copy, compiled with its own flags.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

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
    for (int k = 0; k < group; k += 4) {
      int8_t* to = values + int64_t(start + k) * count;
      for (int j = 0; j < 4; ++j) {
        const float scaled = (usable ? x[start + k + j] : 0.0f) * inverse;
        const int8_t value = int8_t(std::nearbyintf(scaled));
        to[j] = value;
        sum += value;
      }
    }
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

template <int kBits>
[[maybe_unused]] void generic_tile_row(const uint8_t* tiles, const Tokens& tokens, int inputs, int group,
                                       float* out) {
  const int count = tokens.count;
  std::memset(out, 0, sizeof(float) * kTileRows * count);
  const int64_t tile_bytes = kScaleBytes + int64_t(4) * kBits * group;
  for (int g = 0; g < inputs / group; ++g, tiles += tile_bytes) {
    float scale[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      uint16_t bits;
      std::memcpy(&bits, tiles + 2 * r, 2);
      scale[r] = to_float(bits);
    }
    for (int t = 0; t < count; ++t) {
      int32_t sums[kTileRows];
      for (int r = 0; r < kTileRows; ++r) sums[r] = tokens.offsets[g * count + t];
      const int8_t* x = tokens.values + (int64_t(g) * group * count + t * 4);
      const uint8_t* w = tiles + kScaleBytes;
      for (int k = 0; k < group; k += 4, x += 4 * count, w += 16 * kBits) {
        for (int j = 0; j < 4; ++j) {
          const int32_t value = x[j];
          for (int r = 0; r < 16; ++r) {
            if constexpr (kBits == 4) {
              sums[r] += value * (w[4 * r + j] & 15);
              sums[16 + r] += value * (w[4 * r + j] >> 4);
            } else {
              sums[r] += value * w[4 * r + j];
              sums[16 + r] += value * w[64 + 4 * r + j];
            }
          }
        }
      }
      const float token_scale = tokens.scales[g * count + t];
      float* to = out + t * kTileRows;
      for (int r = 0; r < kTileRows; ++r) to[r] += float(sums[r]) * (scale[r] * token_scale);
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

[[maybe_unused]] void generic_dot_bf16(const uint16_t* w, int rows, const uint16_t* x, int count, int inputs,
                                       float* out) {
  constexpr int kLanes = 32;
  for (int r = 0; r < rows; ++r, w += inputs) {
    for (int t = 0; t < count; ++t) {
      const uint16_t* row = x + int64_t(t) * inputs;
      float sums[kLanes] = {};
      int k = 0;
      for (; k + kLanes <= inputs; k += kLanes) {
        for (int j = 0; j < kLanes; ++j) sums[j] += to_float(w[k + j]) * to_float(row[k + j]);
      }
      float sum = 0;
      for (; k < inputs; ++k) sum += to_float(w[k]) * to_float(row[k]);
      for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
      }
      out[t * rows + r] = sum + sums[0];
    }
  }
}

}  // namespace
