// Attention kernels in plain C++ that compilers vectorise; in an unnamed namespace, as generic.h.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "attention.h"
#include "lanes.h"

namespace {

using namespace xv;

constexpr float kLog2e = 1.44269504f;
constexpr int kMaxHeadDim = 256;

[[maybe_unused]] void load_query(const void* query, Type type, int head_dim, float* to) {
  for (int d = 0; d < head_dim; ++d)
    to[d] = type == kFloat32 ? static_cast<const float*>(query)[d]
                             : to_float(static_cast<const uint16_t*>(query)[d]);
}

inline void clear(Part* parts, int heads, int head_dim) {
  for (int head = 0; head < heads; ++head) {
    parts[head].maximum = -std::numeric_limits<float>::infinity();
    parts[head].total = 0;
    std::memset(parts[head].sums, 0, sizeof(float) * head_dim);
  }
}

constexpr int kSums = 4;  // vectors of sums at a time: their additions do not wait for each other

// The dot product of a query with a cached row.
template <class Stored>
inline float dot(const float* q, const Stored* row, int head_dim) {
  Lanes sums[kSums] = {};
  for (int d = 0; d < head_dim; d += kSums * kWidth)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) sums[i] += load_lanes(q + d + i * kWidth) * load_lanes(row + d + i * kWidth);
  return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// One head's query against up to kKeyGroup positions of a block.
template <class Stored>
inline void attend(const float* q, const Stored* keys, const Stored* values, const float* key_scales,
                   const float* value_scales, int count, int head_dim, Part& part) {
  constexpr bool kScaled = sizeof(Stored) == 1;
  const float unit = kLog2e / std::sqrt(float(head_dim));
  alignas(64) float weights[kKeyGroup];
  float largest = part.maximum;
  for (int j = 0; j < count; ++j, keys += head_dim) {
    weights[j] = dot(q, keys, head_dim) * unit;
    if (kScaled) weights[j] *= key_scales[j];
    largest = weights[j] > largest ? weights[j] : largest;
  }
  for (int j = count; j < kKeyGroup; ++j) weights[j] = -std::numeric_limits<float>::infinity();
  const float shrink = largest > part.maximum ? std::exp2(part.maximum - largest) : 1.0f;
  part.maximum = largest;
  Lanes total = {};
  for (int j = 0; j < kKeyGroup; j += kWidth) {
    const Lanes weight = exp2_below_zero(load_lanes(weights + j) - largest);
    total += weight;
    store_lanes(weights + j, weight);
  }
  part.total = part.total * shrink + sum_of(total);
  if (kScaled)
    for (int j = 0; j < count; ++j) weights[j] *= value_scales[j];
  for (int d = 0; d < head_dim; d += kSums * kWidth, values += kSums * kWidth) {
    Lanes sums[kSums];
    for (int i = 0; i < kSums; ++i) sums[i] = load_lanes(part.sums + d + i * kWidth) * shrink;
    for (int j = 0; j < count; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kSums; ++i) sums[i] += weights[j] * load_lanes(values + int64_t(j) * head_dim + i * kWidth);
    for (int i = 0; i < kSums; ++i) store_lanes(part.sums + d + i * kWidth, sums[i]);
  }
}

template <class Stored>
[[maybe_unused]] void generic_decode_of(const PagedCache& cache, const int32_t* blocks, int begin, int end,
                                        const Rows& queries, int64_t query, Part* parts) {
  clear(parts, cache.heads, cache.head_dim);
  for (int at = begin; at < end; at += cache.block_size) {
    const int32_t block = blocks[at / cache.block_size];
    const int count = end - at < cache.block_size ? end - at : cache.block_size;
    for (int head = 0; head < cache.heads; ++head) {
      float q[kMaxHeadDim];
      load_query(queries.at(query, head), queries.type, cache.head_dim, q);
      for (int j = 0; j < count; j += kKeyGroup)
        attend(q, cache.row<Stored>(cache.keys, block, head, j),
               cache.row<Stored>(cache.values, block, head, j), cache.scale(cache.keys, block, head, j),
               cache.scale(cache.values, block, head, j),
               count - j < kKeyGroup ? count - j : kKeyGroup, cache.head_dim, parts[head]);
    }
  }
}

[[maybe_unused]] void generic_decode(const PagedCache& cache, const int32_t* blocks, int begin, int end,
                                     const Rows& queries, int64_t query, Part* parts) {
  const auto decode = cache.type == kFloat32    ? generic_decode_of<float>
                      : cache.type == kBFloat16 ? generic_decode_of<uint16_t>
                                                : generic_decode_of<int8_t>;
  decode(cache, blocks, begin, end, queries, query, parts);
}

// One scale for the whole vector. NaN or infinity in it makes the scale NaN, so that it cannot pass for a number.
inline float quantize_vector(const float* x, int size, int8_t* to) {
  uint32_t largest = 0;  // as integers, magnitudes keep their order and NaN is the largest
  for (int d = 0; d < size; ++d) {
    uint32_t bits;
    std::memcpy(&bits, x + d, 4);
    bits &= 0x7fffffff;
    largest = bits > largest ? bits : largest;
  }
  float maximum;
  std::memcpy(&maximum, &largest, 4);
  const bool finite = largest < 0x7f800000;
  if (!finite || maximum < 127 * std::numeric_limits<float>::min()) {
    std::memset(to, 0, size);
    return finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float inverse = 127.0f / maximum;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  for (int d = 0; d < size; ++d) {
    const float shifted = x[d] * inverse + kRound;
    int32_t bits;
    std::memcpy(&bits, &shifted, 4);
    to[d] = int8_t(bits);
  }
  return maximum / 127.0f;
}

[[maybe_unused]] void generic_append(const PagedCache& cache, const Pages& pages, const Rows& rows,
                                     const int64_t* slots, int64_t first, int64_t last) {
  const int head_dim = cache.head_dim;
  for (int64_t token = first; token < last; ++token) {
    const int64_t block = slots[token] / cache.block_size;
    const int offset = int(slots[token] % cache.block_size);
    for (int head = 0; head < cache.heads; ++head) {
      const void* from = rows.at(token, head);
      if (cache.type == rows.type && cache.type == kBFloat16) {
        std::memcpy(cache.row<uint16_t>(pages, block, head, offset), from, size_t(2) * head_dim);
        continue;
      }
      float x[kMaxHeadDim];
      load_query(from, rows.type, head_dim, x);
      if (cache.type == kInt8) {
        *cache.scale(pages, block, head, offset) =
            quantize_vector(x, head_dim, cache.row<int8_t>(pages, block, head, offset));
      } else if (cache.type == kBFloat16) {
        uint16_t* to = cache.row<uint16_t>(pages, block, head, offset);
        for (int d = 0; d < head_dim; ++d) to[d] = to_bfloat16(x[d]);
      } else {
        std::memcpy(cache.row<float>(pages, block, head, offset), x, sizeof(float) * head_dim);
      }
    }
  }
}

}  // namespace
