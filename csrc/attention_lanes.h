// Prefill attention over a paged cache for any processor: tiles of queries by runs of keys with an online softmax
// (FlashAttention, Dao et al., 2022, arXiv:2205.14135), in float32. Each lane holds a query: keys and values are
// broadcast, and the softmax needs no sum across lanes. In an unnamed namespace, as generic.h.
#pragma once

#include "attention_generic.h"
#include "lanes.h"

namespace {

using namespace xv;

constexpr int kRun = 32;      // keys between two updates of the softmax: as floats they fit in the L1 cache
constexpr int kRows = 4;      // rows of a product: 12 sums with three vectors of queries
constexpr int kVectors = 3;
constexpr int kPass = kVectors * kWidth;  // queries of a product
constexpr float kNone = -std::numeric_limits<float>::infinity();

struct alignas(64) PrefillScratch {
  float queries[kMaxHeadDim][kPrefillRows];
  float scores[kRun][kPrefillRows];  // later the weights
  float rows[kRun][kMaxHeadDim];     // keys, then values
  float sums[kMaxHeadDim][kPrefillRows];
};

// sums[r] += over steps: the step's value of row r times its queries in the lanes.
inline void multiply(const float* values, int64_t row_stride, int64_t step_stride, int steps, const float* lanes,
                     Lanes (&sums)[kRows][kVectors]) {
  for (int step = 0; step < steps; ++step, values += step_stride, lanes += kPrefillRows) {
    Lanes lane[kVectors];
#pragma GCC unroll 3
    for (int i = 0; i < kVectors; ++i) lane[i] = load_lanes(lanes + i * kWidth);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const float value = values[r * row_stride];
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) sums[r][i] += value * lane[i];
    }
  }
}

// `count` cached rows as floats; missing rows up to a multiple of kRows are zeros, because memory there may hold NaN.
template <class Stored>
inline void load_rows(const PagedCache& cache, const Pages& pages, const int32_t* blocks, int key_head, int at,
                      int count, float (*to)[kMaxHeadDim]) {
  const int head_dim = cache.head_dim;
  for (int j = 0; j < count; ++j) {
    const int32_t block = blocks[(at + j) / cache.block_size];
    const Stored* row = cache.row<const Stored>(pages, block, key_head, (at + j) % cache.block_size);
    for (int d = 0; d < head_dim; d += kWidth) store_lanes(to[j] + d, load_lanes(row + d));
  }
  for (int j = count; j % kRows != 0; ++j) std::memset(to[j], 0, sizeof(float) * head_dim);
}

template <class Stored>
void prefill_of(const PagedCache& cache, const int32_t* blocks, int head, int start, const Rows& queries, int first,
                int count, uint16_t* out) {
  constexpr bool kScaled = sizeof(Stored) == 1;
  const int head_dim = cache.head_dim, group = queries.group, key_head = head / group;
  const int lanes = (count + kPass - 1) / kPass * kPass;  // queries computed; those past `count` repeat the first
  const float unit = kLog2e / std::sqrt(float(head_dim));
  PrefillScratch scratch;
  for (int row = 0; row < lanes; ++row) {
    const int64_t query = (first + (row < count ? row : 0)) * int64_t(group) + head % group;
    const auto* values = static_cast<const uint16_t*>(queries.at(query, key_head));
    for (int d = 0; d < head_dim; ++d) scratch.queries[d][row] = to_float(values[d]);
  }
  float maximum[kPrefillRows], total[kPrefillRows];
  for (int i = 0; i < lanes; ++i) maximum[i] = kNone, total[i] = 0;
  for (int d = 0; d < head_dim; ++d) std::memset(scratch.sums[d], 0, sizeof(float) * lanes);

  const int end = start + first + count;
  for (int at = 0; at < end; at += kRun) {
    const int keys = end - at < kRun ? end - at : kRun;
    load_rows<Stored>(cache, cache.keys, blocks, key_head, at, keys, scratch.rows);
    for (int j = 0; j < keys; j += kRows)
      for (int pass = 0; pass < lanes; pass += kPass) {
        Lanes sums[kRows][kVectors] = {};
        multiply(scratch.rows[j], kMaxHeadDim, 1, head_dim, scratch.queries[0] + pass, sums);
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kVectors; ++i) store_lanes(scratch.scores[j + r] + pass + i * kWidth, sums[r][i]);
      }
    for (int j = 0; j < keys; ++j) {
      float scale = unit;
      if constexpr (kScaled) {
        const int32_t block = blocks[(at + j) / cache.block_size];
        scale *= *cache.scale(cache.keys, block, key_head, (at + j) % cache.block_size);
      }
      const int hidden = at + j - (start + first);  // queries of the tile before this key
      for (int i = 0; i < lanes; ++i)
        scratch.scores[j][i] = i < hidden ? kNone : scratch.scores[j][i] * scale;
    }
    float value_scales[kRun];
    for (int j = 0; kScaled && j < keys; ++j)
      value_scales[j] = *cache.scale(cache.values, blocks[(at + j) / cache.block_size], key_head,
                                     (at + j) % cache.block_size);
    alignas(64) float shrink[kPrefillRows];
    for (int i = 0; i < lanes; i += kWidth) {
      const Lanes before = load_lanes(maximum + i);
      Lanes largest = before;
      for (int j = 0; j < keys; ++j) largest = largest_of(load_lanes(scratch.scores[j] + i), largest);
      // Of a query that has seen no key yet, minus infinity less itself would be NaN.
      const Lanes by = exp2_below_zero(choose(largest == kNone, Lanes{}, before - largest));
      Lanes sum = load_lanes(total + i) * by;
      for (int j = 0; j < keys; ++j) {
        Lanes weight = exp2_below_zero(load_lanes(scratch.scores[j] + i) - largest);
        sum += weight;
        if constexpr (kScaled) weight *= value_scales[j];
        store_lanes(scratch.scores[j] + i, weight);
      }
      store_lanes(shrink + i, by);
      store_lanes(maximum + i, largest);
      store_lanes(total + i, sum);
    }
    load_rows<Stored>(cache, cache.values, blocks, key_head, at, keys, scratch.rows);
    for (int d = 0; d < head_dim; d += kRows)
      for (int pass = 0; pass < lanes; pass += kPass) {
        Lanes sums[kRows][kVectors];
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kVectors; ++i)
            sums[r][i] = load_lanes(scratch.sums[d + r] + pass + i * kWidth) * load_lanes(shrink + pass + i * kWidth);
        multiply(scratch.rows[0] + d, 1, kMaxHeadDim, keys, scratch.scores[0] + pass, sums);
        for (int r = 0; r < kRows; ++r)
          for (int i = 0; i < kVectors; ++i) store_lanes(scratch.sums[d + r] + pass + i * kWidth, sums[r][i]);
      }
  }
  for (int row = 0; row < count; ++row) {
    uint16_t* to = out + (int64_t(first + row) * cache.heads * group + head) * head_dim;
    const float inverse = 1.0f / total[row];
    for (int d = 0; d < head_dim; ++d) to[d] = to_bfloat16(scratch.sums[d][row] * inverse);
  }
}

[[maybe_unused]] void prefill_lanes(const PagedCache& cache, const int32_t* blocks, int head, int start,
                                    const Rows& queries, int first, int count, uint16_t* out) {
  const auto run = cache.type == kInt8 ? prefill_of<int8_t> : prefill_of<uint16_t>;
  run(cache, blocks, head, start, queries, first, count, out);
}

}  // namespace
