// Attention for training in bfloat16, forward and backward, for x86 with AVX-512 BF16: blocks of queries by blocks of
// keys with an online softmax (FlashAttention-2, Dao, 2023, arXiv:2307.08691). One call computes one head, so that the
// order of every sum is the same for any number of threads.
//
// Scores are transposed, [keys, queries]: each lane holds a query, and softmax needs no sum across lanes. In each
// product one operand is broadcast as pairs of bfloat16, the other is in the lanes; pairs are along the summed
// dimension.
#if defined(__x86_64__)
#include "training.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "attention_avx512.h"

namespace {

using namespace xv;

constexpr int kSide = 64;           // queries, and keys, of a block
constexpr int kVectors = kSide / 16;
constexpr int kRows = 6;            // rows of a product: 24 sums with four registers of lanes
constexpr float kLog2e = 1.44269504f;
constexpr float kHidden = -1e30f;   // a masked score; times any sensible scale it is far below kLowest
constexpr float kLowest = -1e20f;   // initial running maximum

// 2^x with a relative error of 4e-6; underflows to 0, overflows to infinity, NaN stays NaN.
inline __m512 exp2_of(__m512 x) {
  const __m512 rest = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // 0 to 1
  __m512 y = _mm512_set1_ps(1.35341679e-02f);
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(5.20114628e-02f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(2.41442754e-01f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(6.93003836e-01f));
  y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.00000259e+00f));
  return _mm512_scalef_ps(y, x);  // scalef rounds x down
}

// sums[r] += over steps: pair r of this step, broadcast, times the step's pairs in the lanes.
template <int kCount, int kWidth>
inline void multiply(const void* pairs, int64_t row_stride, int64_t step_stride, int steps, const __m512i* lanes,
                     int lane_stride, __m512 (&sums)[kCount][kWidth]) {
  const char* at = static_cast<const char*>(pairs);
  for (int step = 0; step < steps; ++step, at += step_stride, lanes += lane_stride) {
    __m512bh lane[kWidth];
#pragma GCC unroll 4
    for (int i = 0; i < kWidth; ++i) lane[i] = (__m512bh)lanes[i];
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
      int32_t pair;
      std::memcpy(&pair, at + r * row_stride, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
      for (int i = 0; i < kWidth; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], both, lane[i]);
    }
  }
}

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// Calls body(row, rows) for 0 to count - 1, count a multiple of 16: runs of 6 rows, then of 4.
template <class Body>
inline void by_rows(int count, const Body& body) {
  int row = 0;
  for (; count - row >= kRows && count - row != 8; row += kRows) body(row, Constant<kRows>());
  for (; row < count; row += 4) body(row, Constant<4>());
}

inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
    t[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(b, d, 0x88);
    t[8 + i] = _mm512_shuffle_i32x4(a, c, 0xdd);
    t[12 + i] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

inline __m512i row_or_zeros(const uint16_t* rows, int row, int count, int width, int at) {
  return row < count ? _mm512_loadu_si512(rows + int64_t(row) * width + at) : _mm512_setzero_si512();
}

// `count` rows to lanes [kDim / 2][kVectors]: pairs along the row; zeros for missing rows.
template <int kDim>
inline void to_lanes(const uint16_t* rows, int count, __m512i* lanes) {
  for (int v = 0; v < kVectors; ++v)
    for (int d = 0; d < kDim; d += 32) {
      __m512i part[16];
      for (int i = 0; i < 16; ++i) part[i] = row_or_zeros(rows, 16 * v + i, count, kDim, d);
      transpose(part);
      for (int i = 0; i < 16; ++i) lanes[(d / 2 + i) * kVectors + v] = part[i];
    }
}

// `count` rows to [kSide / 2][kDim / 16]: pairs of adjacent rows.
template <int kDim>
inline void to_pairs(const uint16_t* rows, int count, __m512i* pairs) {
  alignas(64) static constexpr uint16_t low[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                   8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i first = _mm512_load_si512(low), second = _mm512_add_epi16(first, _mm512_set1_epi16(16));
  for (int row = 0; row < kSide; row += 2)
    for (int d = 0; d < kDim; d += 32) {
      const __m512i a = row_or_zeros(rows, row, count, kDim, d), b = row_or_zeros(rows, row + 1, count, kDim, d);
      *pairs++ = _mm512_permutex2var_epi16(a, first, b);
      *pairs++ = _mm512_permutex2var_epi16(a, second, b);
    }
}

inline __m512i round_two(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

// sums [kDim][kVectors], queries in the lanes, times `by`, to `count` bfloat16 rows.
template <int kDim>
inline void from_lanes(const __m512* sums, const __m512 (&by)[kVectors], int count, uint16_t* rows) {
  for (int v = 0; v < kVectors; ++v)
    for (int d = 0; d < kDim; d += 32) {
      __m512i part[16];
      for (int i = 0; i < 16; ++i) {
        const __m512* two = sums + (d + 2 * i) * kVectors + v;
        part[i] = interleave_halves(round_two(_mm512_mul_ps(two[0], by[v]), _mm512_mul_ps(two[kVectors], by[v])));
      }
      transpose(part);
      for (int i = 0; i < 16 && 16 * v + i < count; ++i)
        _mm512_storeu_si512(rows + int64_t(16 * v + i) * kDim + d, part[i]);
    }
}

// Which queries of a block see which keys: those from starts[query] to the query itself.
struct Mask {
  __m512i starts[kVectors], queries[kVectors];
  int least, most;  // of the starts

  Mask(const int32_t* from, int first, int count) {
    alignas(64) int32_t each[kSide];
    least = most = from[first];
    for (int i = 0; i < kSide; ++i) {
      each[i] = from[first + (i < count ? i : count - 1)];
      least = each[i] < least ? each[i] : least;
      most = each[i] > most ? each[i] : most;
    }
    alignas(64) static constexpr int32_t count_up[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int i = 0; i < kVectors; ++i) {
      starts[i] = _mm512_load_si512(each + 16 * i);
      queries[i] = _mm512_add_epi32(_mm512_load_si512(count_up), _mm512_set1_epi32(first + 16 * i));
    }
  }

  __mmask16 sees(int i, int key) const {
    const __m512i at = _mm512_set1_epi32(key);
    return _mm512_mask_cmple_epi32_mask(_mm512_cmple_epi32_mask(starts[i], at), at, queries[i]);
  }
};

// Calls body(first vector) with a constant: on the diagonal, queries before the key are skipped.
template <class Body>
inline void from_vector(bool diagonal, int row, const Body& body) {
  const int first = diagonal ? row / 16 : 0;
  if (first == 0)
    body(Constant<0>());
  else if (first == 1)
    body(Constant<1>());
  else
    body(Constant<2>());  // with one vector the latency of the sums would be the limit
}

// Sums [kDim][kVectors] = by * sums + `pairs` [kSide / 2][kDim], broadcast, times weights [kSide / 2][kVectors].
template <int kDim, bool kScaled>
inline void add_values(const __m512i* pairs, const __m512i* weights, const __m512* by, bool diagonal, __m512* sums) {
  const auto part = [&](auto first, auto width, int steps) {
    constexpr int kFirst = decltype(first)::value, kWidth = decltype(width)::value;
    by_rows(kDim, [&](int d, auto rows) {
      constexpr int kCount = decltype(rows)::value;
      __m512 own[kCount][kWidth];
      for (int r = 0; r < kCount; ++r)
        for (int i = 0; i < kWidth; ++i) {
          own[r][i] = sums[(d + r) * kVectors + kFirst + i];
          if constexpr (kScaled) own[r][i] = _mm512_mul_ps(own[r][i], by[kFirst + i]);
        }
      multiply<kCount, kWidth>(reinterpret_cast<const uint32_t*>(pairs) + d, 4, 4 * kDim, steps, weights + kFirst,
                               kVectors, own);
      for (int r = 0; r < kCount; ++r)
        for (int i = 0; i < kWidth; ++i) sums[(d + r) * kVectors + kFirst + i] = own[r][i];
    });
  };
  if (diagonal) {  // the first half of the queries sees no key of the second
    part(Constant<0>(), Constant<kVectors / 2>(), kSide / 4);
    part(Constant<kVectors / 2>(), Constant<kVectors / 2>(), kSide / 2);
  } else {
    part(Constant<0>(), Constant<kVectors>(), kSide / 2);
  }
}

inline int at_most(int value, int limit) { return value < limit ? value : limit; }

// The rows of a block; if some are missing, a copy padded with zeros.
template <int kDim>
inline const uint16_t* whole(const uint16_t* rows, int count, uint16_t* copy) {
  if (count >= kSide) return rows;
  std::memcpy(copy, rows, sizeof(uint16_t) * size_t(count) * kDim);
  std::memset(copy + count * kDim, 0, sizeof(uint16_t) * size_t(kSide - count) * kDim);
  return copy;
}

template <int kDim>
void forward(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* starts, uint16_t* out,
             float* log_sums, int length, float scale, void* memory) {
  const __m512 unit = _mm512_set1_ps(scale * kLog2e);
  constexpr int kBlock = kSide / 2 * kDim / 16;  // vectors of a packed block
  auto* values = static_cast<__m512i*>(memory);
  for (int at = 0; at < length; at += kSide)
    to_pairs<kDim>(v + int64_t(at) * kDim, length - at, values + at / kSide * kBlock);
  alignas(64) uint16_t copy[kSide * kDim];
  __m512i queries[kBlock], weights[kSide / 2 * kVectors];
  __m512 scores[kSide * kVectors], sums[kDim * kVectors];

  for (int first = 0; first < length; first += kSide) {
    const int count = at_most(length - first, kSide);
    const Mask mask(starts, first, count);
    to_lanes<kDim>(q + int64_t(first) * kDim, count, queries);
    __m512 maximum[kVectors], total[kVectors], shrink[kVectors];
    for (int i = 0; i < kVectors; ++i) maximum[i] = _mm512_set1_ps(kLowest), total[i] = _mm512_setzero_ps();
    for (__m512& sum : sums) sum = _mm512_setzero_ps();

    for (int at = mask.least / kSide * kSide; at <= first; at += kSide) {
      const bool diagonal = at == first, masked = diagonal || at < mask.most;
      const uint16_t* keys = whole<kDim>(k + int64_t(at) * kDim, length - at, copy);
      __m512 largest[kVectors];
      for (int i = 0; i < kVectors; ++i) largest[i] = maximum[i];
      by_rows(kSide, [&](int row, auto rows) {
        constexpr int kCount = decltype(rows)::value;
        from_vector(diagonal, row, [&](auto vector) {
          constexpr int kFirst = decltype(vector)::value, kWidth = kVectors - kFirst;
          __m512 own[kCount][kWidth];
          for (auto& each : own)
            for (__m512& sum : each) sum = _mm512_setzero_ps();
          multiply<kCount, kWidth>(keys + row * kDim, 2 * kDim, 4, kDim / 2, queries + kFirst, kVectors, own);
          for (int r = 0; r < kCount; ++r) {
            __m512* to = scores + (row + r) * kVectors;
            for (int i = 0; i < kFirst; ++i) to[i] = _mm512_set1_ps(kHidden);
            for (int i = kFirst; i < kVectors; ++i) {
              __m512 score = own[r][i - kFirst];
              if (masked)
                score = _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), mask.sees(i, at + row + r), score);
              largest[i] = _mm512_max_ps(largest[i], score);
              to[i] = score;
            }
          }
        });
      });
      for (int i = 0; i < kVectors; ++i) {
        shrink[i] = exp2_of(_mm512_mul_ps(_mm512_sub_ps(maximum[i], largest[i]), unit));
        maximum[i] = largest[i];
        const __m512 less = _mm512_mul_ps(largest[i], unit);
        __m512 sum = _mm512_mul_ps(total[i], shrink[i]);
        for (int row = 0; row < kSide; row += 2) {
          const __m512 a = exp2_of(_mm512_fmsub_ps(scores[row * kVectors + i], unit, less));
          const __m512 b = exp2_of(_mm512_fmsub_ps(scores[(row + 1) * kVectors + i], unit, less));
          sum = _mm512_add_ps(sum, _mm512_add_ps(a, b));
          weights[row / 2 * kVectors + i] = interleave_halves(round_two(a, b));
        }
        total[i] = sum;
      }
      add_values<kDim, true>(values + at / kSide * kBlock, weights, shrink, diagonal, sums);
    }

    alignas(64) float sum[kSide], most[kSide];
    __m512 inverse[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      inverse[i] = _mm512_div_ps(_mm512_set1_ps(1.0f), total[i]);
      _mm512_store_ps(sum + 16 * i, total[i]);
      _mm512_store_ps(most + 16 * i, maximum[i]);
    }
    for (int i = 0; i < count; ++i) log_sums[first + i] = most[i] * scale + std::log(sum[i]);
    from_lanes<kDim>(sums, inverse, count, out + int64_t(first) * kDim);
  }
}

// Each key's row of sums [kSide][kDim] += weights [kSide keys][kSide queries], broadcast, times `pairs` of queries.
template <int kDim>
inline void add_queries(const uint16_t* weights, const __m512i* pairs, bool diagonal, __m512* sums) {
  constexpr int kWide = kDim / 16;
  for (int part = 0; part < kWide; part += kVectors)
    by_rows(kSide, [&](int row, auto rows) {
      constexpr int kCount = decltype(rows)::value;
      __m512 own[kCount][kVectors];
      for (int r = 0; r < kCount; ++r)
        for (int i = 0; i < kVectors; ++i) own[r][i] = sums[(row + r) * kWide + part + i];
      const int skip = diagonal ? row / 2 : 0;  // pairs of queries before the key
      multiply<kCount, kVectors>(weights + row * kSide + 2 * skip, 2 * kSide, 4, kSide / 2 - skip,
                                 pairs + skip * kWide + part, kWide, own);
      for (int r = 0; r < kCount; ++r)
        for (int i = 0; i < kVectors; ++i) sums[(row + r) * kWide + part + i] = own[r][i];
    });
}

template <int kDim>
inline void save_rows(const __m512* sums, float by, int count, uint16_t* rows) {
  const __m512 scale = _mm512_set1_ps(by);
  for (int i = 0; i < count * kDim / 32; ++i)
    _mm512_storeu_si512(rows + 32 * i,
                        round_two(_mm512_mul_ps(sums[2 * i], scale), _mm512_mul_ps(sums[2 * i + 1], scale)));
}

// What the backward pass keeps for a block of queries.
template <int kDim>
struct Block {
  static constexpr int kSize = kSide / 2 * kDim / 16;
  __m512i query_lanes[kSize], query_pairs[kSize], grad_lanes[kSize], grad_pairs[kSize];
  __m512 sums[kDim * kVectors];                 // of dq, queries in the lanes
  __m512 log_sums[kVectors], means[kVectors];   // log_sums: base 2; means: the sum over keys of p * dp
};

template <int kDim>
void backward(const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* out,
              const float* log_sums, const int32_t* starts, uint16_t* dq, uint16_t* dk, uint16_t* dv, int length,
              float scale, void* memory) {
  const __m512 unit = _mm512_set1_ps(scale * kLog2e);
  auto* blocks = static_cast<Block<kDim>*>(memory);
  for (int first = 0; first < length; first += kSide) {
    Block<kDim>& block = blocks[first / kSide];
    const int64_t at = int64_t(first) * kDim;
    const int count = at_most(length - first, kSide);
    to_lanes<kDim>(q + at, count, block.query_lanes);
    to_pairs<kDim>(q + at, count, block.query_pairs);
    to_lanes<kDim>(grad + at, count, block.grad_lanes);
    to_pairs<kDim>(grad + at, count, block.grad_pairs);
    for (__m512& sum : block.sums) sum = _mm512_setzero_ps();
    alignas(64) float means[kSide] = {}, logs[kSide] = {};
    for (int i = 0; i < count; ++i) {
      __m512 sum = _mm512_setzero_ps();
      for (int d = 0; d < kDim; d += 32)
        sum = _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(grad + at + i * kDim + d),
                               (__m512bh)_mm512_loadu_si512(out + at + i * kDim + d));
      means[i] = _mm512_reduce_add_ps(sum);
      logs[i] = log_sums[first + i] * kLog2e;
    }
    for (int i = 0; i < kVectors; ++i) {
      block.means[i] = _mm512_load_ps(means + 16 * i);
      block.log_sums[i] = _mm512_load_ps(logs + 16 * i);
    }
  }

  alignas(64) uint16_t key_copy[kSide * kDim], value_copy[kSide * kDim], weights[kSide * kSide],
      dscores[kSide * kSide];
  __m512i key_pairs[Block<kDim>::kSize], dscore_pairs[kSide / 2 * kVectors];
  __m512 key_sums[kSide * kDim / 16], value_sums[kSide * kDim / 16];
  for (int at = 0; at < length; at += kSide) {
    const int64_t place = int64_t(at) * kDim;
    const uint16_t* keys = whole<kDim>(k + place, length - at, key_copy);
    const uint16_t* values = whole<kDim>(v + place, length - at, value_copy);
    to_pairs<kDim>(keys, kSide, key_pairs);
    for (__m512& sum : key_sums) sum = _mm512_setzero_ps();
    for (__m512& sum : value_sums) sum = _mm512_setzero_ps();

    for (int first = at; first < length; first += kSide) {
      const Mask mask(starts, first, at_most(length - first, kSide));
      if (mask.least >= at + kSide) continue;
      Block<kDim>& block = blocks[first / kSide];
      const bool diagonal = at == first, masked = diagonal || at < mask.most;
      by_rows(kSide, [&](int row, auto rows) {
        constexpr int kCount = decltype(rows)::value;
        from_vector(diagonal, row, [&](auto vector) {
          constexpr int kFirst = decltype(vector)::value, kWidth = kVectors - kFirst;
          __m512 own[kCount][kWidth], p[kCount][kVectors], ds[kCount][kVectors];
          for (auto& each : own)
            for (__m512& sum : each) sum = _mm512_setzero_ps();
          multiply<kCount, kWidth>(keys + row * kDim, 2 * kDim, 4, kDim / 2, block.query_lanes + kFirst, kVectors,
                                   own);
          for (int r = 0; r < kCount; ++r)
            for (int i = 0; i < kVectors; ++i) {
              p[r][i] = ds[r][i] = _mm512_setzero_ps();
              if (i < kFirst) continue;
              p[r][i] = exp2_of(_mm512_fmsub_ps(own[r][i < kFirst ? 0 : i - kFirst], unit, block.log_sums[i]));
              if (masked) p[r][i] = _mm512_maskz_mov_ps(mask.sees(i, at + row + r), p[r][i]);
            }
          for (auto& each : own)
            for (int i = 0; i < kWidth; ++i) each[i] = _mm512_sub_ps(_mm512_setzero_ps(), block.means[kFirst + i]);
          multiply<kCount, kWidth>(values + row * kDim, 2 * kDim, 4, kDim / 2, block.grad_lanes + kFirst, kVectors,
                                   own);
          for (int r = 0; r < kCount; ++r) {
            for (int i = kFirst; i < kVectors; ++i) ds[r][i] = _mm512_mul_ps(p[r][i], own[r][i - kFirst]);
            for (int i = 0; i < kVectors; i += 2) {
              _mm512_store_si512(weights + (row + r) * kSide + 16 * i, round_two(p[r][i], p[r][i + 1]));
              _mm512_store_si512(dscores + (row + r) * kSide + 16 * i, round_two(ds[r][i], ds[r][i + 1]));
            }
          }
          for (int r = 0; r < kCount; r += 2)
            for (int i = 0; i < kVectors; ++i)
              dscore_pairs[(row + r) / 2 * kVectors + i] = interleave_halves(round_two(ds[r][i], ds[r + 1][i]));
        });
      });
      add_queries<kDim>(weights, block.grad_pairs, diagonal, value_sums);
      add_queries<kDim>(dscores, block.query_pairs, diagonal, key_sums);
      add_values<kDim, false>(key_pairs, dscore_pairs, nullptr, diagonal, block.sums);
    }
    const int count = at_most(length - at, kSide);
    save_rows<kDim>(key_sums, scale, count, dk + place);
    save_rows<kDim>(value_sums, 1.0f, count, dv + place);
  }
  const __m512 by[kVectors] = {_mm512_set1_ps(scale), _mm512_set1_ps(scale), _mm512_set1_ps(scale),
                               _mm512_set1_ps(scale)};
  for (int first = 0; first < length; first += kSide)
    from_lanes<kDim>(blocks[first / kSide].sums, by, at_most(length - first, kSide), dq + int64_t(first) * kDim);
}

template <int kDim>
int64_t forward_bytes(int length) {
  return int64_t(length + kSide - 1) / kSide * kSide * kDim * int64_t(sizeof(uint16_t));
}

template <int kDim>
int64_t backward_bytes(int length) {
  return int64_t(length + kSide - 1) / kSide * int64_t(sizeof(Block<kDim>));
}

}  // namespace

namespace xv {
const TrainingAttention kTrainingAttention64 = {forward<64>, backward<64>, forward_bytes<64>, backward_bytes<64>};
const TrainingAttention kTrainingAttention128 = {forward<128>, backward<128>, forward_bytes<128>,
                                                   backward_bytes<128>};
}  // namespace xv
#endif
