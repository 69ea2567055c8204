// Prefill attention over a paged cache, for x86 with AVX-512 BF16: tiles of queries by runs of keys with an online
// softmax (FlashAttention, Dao et al., 2022, arXiv:2205.14135). Each lane holds a query: keys are read as they are
// stored, broadcast as pairs of bfloat16, and the softmax needs no sum across lanes.
#if defined(__x86_64__)
#include "attention_avx512.h"

#include "attention_generic.h"

namespace {

constexpr int kRun = 64;   // keys between two updates of the softmax
constexpr int kBlock = 8;  // rows of a product: 24 sums with three registers of queries

struct alignas(64) Scratch {
  __m512i queries[kMaxHeadDim / 2][3];  // pairs along the head's dimension
  __m512 scores[kRun][3];
  __m512i weights[kRun / 2][3];                 // pairs of keys
  uint32_t values[kRun / 2][kMaxHeadDim];       // pairs of keys; rows of head_dim
  uint16_t keys[kRun][kMaxHeadDim];             // int8 keys as bfloat16, exactly; rows of head_dim
  __m512 sums[kMaxHeadDim][3];
};

// sums[r] += over steps: pair r of this step, broadcast, times the step's pairs in the lanes.
template <int kVectors>
inline void multiply(const char* pairs, int64_t row_stride, int64_t step_stride, int steps,
                     const __m512i (*lanes)[3], __m512 (&sums)[kBlock][kVectors]) {
  for (int step = 0; step < steps; ++step, pairs += step_stride) {
    __m512bh lane[kVectors];
    for (int i = 0; i < kVectors; ++i) lane[i] = (__m512bh)lanes[step][i];
#pragma GCC unroll 8
    for (int r = 0; r < kBlock; ++r) {
      int32_t pair;
      std::memcpy(&pair, pairs + r * row_stride, 4);
      const __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 3
      for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_dpbf16_ps(sums[r][i], both, lane[i]);
    }
  }
}

inline __m512i as_bfloat16(const int8_t* from) {
  const __m512 low = _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  const __m512 high = _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 16))));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
inline __m512i as_bfloat16(const uint16_t* from) { return _mm512_loadu_si512(from); }

// Pairs of adjacent rows. A missing second row is read as zeros: memory there may hold NaN, and 0 * NaN is NaN.
template <class Stored>
inline void pair_rows(const Stored* first, bool has_second, int head_dim, uint32_t* to) {
  for (int d = 0; d < head_dim; d += 32) {
    const __m512i a = as_bfloat16(first + d);
    const __m512i b = has_second ? as_bfloat16(first + head_dim + d) : _mm512_setzero_si512();
    const __m512i low = _mm512_inserti64x4(a, _mm512_castsi512_si256(b), 1);
    const __m512i high = _mm512_inserti64x4(b, _mm512_extracti64x4_epi64(a, 1), 0);
    _mm512_storeu_si512(to + d, interleave_halves(low));
    _mm512_storeu_si512(to + d + 16, interleave_halves(high));
  }
}

template <class Stored, int kVectors>
void tile(const PagedCache& cache, const int32_t* blocks, int head, int start, const Rows& queries, int first,
          int count, uint16_t* out) {
  constexpr bool kScaled = sizeof(Stored) == 1;
  const int head_dim = cache.head_dim, pairs = head_dim / 2;
  const int group = queries.group, key_head = head / group;
  const float unit = kLog2e / std::sqrt(float(head_dim));
  Scratch scratch;
  for (int row = 0; row < 16 * kVectors; ++row) {
    const char* query = static_cast<const char*>(queries.at((first + (row < count ? row : 0)) * int64_t(group) + head % group, key_head));
    for (int i = 0; i < pairs; ++i)
      std::memcpy(reinterpret_cast<uint32_t*>(scratch.queries[i]) + row, query + 4 * i, 4);
  }
  __m512 maximum[kVectors], total[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    maximum[i] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    total[i] = _mm512_setzero_ps();
  }
  for (int d = 0; d < head_dim; ++d)
    for (int i = 0; i < kVectors; ++i) scratch.sums[d][i] = _mm512_setzero_ps();

  const int seen_by_all = start + first + 1, end = start + first + count;
  for (int at = 0; at < end; at += kRun) {
    const int keys = end - at < kRun ? end - at : kRun;
    for (int j = 0; j < keys; j += kBlock) {
      const int32_t block = blocks[(at + j) / cache.block_size];
      const int offset = (at + j) % cache.block_size;
      const auto* rows = cache.row<const Stored>(cache.keys, block, key_head, offset);
      const void* bf16 = rows;
      if constexpr (kScaled) {
        for (int d = 0; d < kBlock * head_dim; d += 32)
          _mm512_storeu_si512(scratch.keys[0] + d, as_bfloat16(rows + d));
        bf16 = scratch.keys[0];
      }
      __m512 sums[kBlock][kVectors];
      for (auto& row : sums)
        for (__m512& sum : row) sum = _mm512_setzero_ps();
      multiply<kVectors>(static_cast<const char*>(bf16), 2 * head_dim, 4, pairs, scratch.queries, sums);
      for (int r = 0; r < kBlock; ++r) {
        float scale = unit;
        if constexpr (kScaled) scale *= cache.scale(cache.keys, block, key_head, offset)[r];
        const int hidden = at + j + r - (seen_by_all - 1);  // queries of the tile before this key
        for (int i = 0; i < kVectors; ++i) {
          const int from = hidden - 16 * i;
          const __mmask16 sees = __mmask16(from <= 0 ? 0xffff : from >= 16 ? 0 : 0xffff << from);
          scratch.scores[j + r][i] =
              _mm512_mask_mul_ps(_mm512_set1_ps(-std::numeric_limits<float>::infinity()), sees, sums[r][i],
                                 _mm512_set1_ps(scale));
        }
      }
    }
    __m512 shrink[kVectors];
    for (int i = 0; i < kVectors; ++i) {
      __m512 largest = maximum[i];
      for (int j = 0; j < keys; ++j) largest = _mm512_max_ps(largest, scratch.scores[j][i]);
      shrink[i] = exp2_below_zero(_mm512_sub_ps(maximum[i], largest));
      maximum[i] = largest;
      total[i] = _mm512_mul_ps(total[i], shrink[i]);
    }
    for (int j = 0; j < keys; j += 2) {
      const int32_t block = blocks[(at + j) / cache.block_size];
      const int offset = (at + j) % cache.block_size;
      const bool second = j + 1 < keys;
      pair_rows(cache.row<const Stored>(cache.values, block, key_head, offset), second, head_dim,
                scratch.values[0] + int64_t(j / 2) * head_dim);
      for (int i = 0; i < kVectors; ++i) {
        __m512 a = exp2_below_zero(_mm512_sub_ps(scratch.scores[j][i], maximum[i]));
        __m512 b = _mm512_setzero_ps();
        if (second) b = exp2_below_zero(_mm512_sub_ps(scratch.scores[j + 1][i], maximum[i]));
        total[i] = _mm512_add_ps(total[i], _mm512_add_ps(a, b));
        if constexpr (kScaled) {
          const float* scales = cache.scale(cache.values, block, key_head, offset);
          a = _mm512_mul_ps(a, _mm512_set1_ps(scales[0]));
          if (second) b = _mm512_mul_ps(b, _mm512_set1_ps(scales[1]));
        }
        scratch.weights[j / 2][i] = interleave_halves((__m512i)_mm512_cvtne2ps_pbh(b, a));
      }
    }
    for (int d = 0; d < head_dim; d += kBlock) {
      __m512 sums[kBlock][kVectors];
      for (int r = 0; r < kBlock; ++r)
        for (int i = 0; i < kVectors; ++i) sums[r][i] = _mm512_mul_ps(scratch.sums[d + r][i], shrink[i]);
      multiply<kVectors>(reinterpret_cast<const char*>(scratch.values[0] + d), 4, int64_t(4) * head_dim,
                         (keys + 1) / 2, scratch.weights, sums);
      for (int r = 0; r < kBlock; ++r)
        for (int i = 0; i < kVectors; ++i) scratch.sums[d + r][i] = sums[r][i];
    }
  }
  for (int i = 0; i < kVectors; ++i) {
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), total[i]);
    for (int d = 0; d < head_dim; d += 2) {
      const __m512i both = interleave_halves((__m512i)_mm512_cvtne2ps_pbh(
          _mm512_mul_ps(scratch.sums[d + 1][i], inverse), _mm512_mul_ps(scratch.sums[d][i], inverse)));
      alignas(64) uint32_t two[16];
      _mm512_store_si512(two, both);
      for (int row = 0; row < 16 && 16 * i + row < count; ++row)
        std::memcpy(out + (int64_t(first + 16 * i + row) * cache.heads * group + head) * head_dim + d, two + row, 4);
    }
  }
}

template <class Stored>
void tile_of(const PagedCache& cache, const int32_t* blocks, int head, int start, const Rows& queries,
             int first, int count, uint16_t* out) {
  const auto run = count > 32 ? tile<Stored, 3> : count > 16 ? tile<Stored, 2> : tile<Stored, 1>;
  run(cache, blocks, head, start, queries, first, count, out);
}

}  // namespace

namespace xv {

void prefill_avx512_bf16(const PagedCache& cache, const int32_t* blocks, int head, int start,
                         const Rows& queries, int first, int count, uint16_t* out) {
  const auto run = cache.type == kInt8 ? tile_of<int8_t> : tile_of<uint16_t>;
  run(cache, blocks, head, start, queries, first, count, out);
}

}  // namespace xv
#endif
