// x86 with AVX-512 VNNI; compiled again with AVX-512 BF16.
#if defined(__x86_64__)
#include "attention_avx512.h"

#include <vector>

#include "attention_lanes.h"

namespace {

// Groups of positions between two updates of the softmax: about a page of keys, then as much of values. Twice as many
// made bfloat16 a quarter slower; half as many made int8 a sixth slower.
constexpr int groups_of(int row_bytes) {
  return row_bytes >= 256 ? 1 : row_bytes >= 128 ? 2 : 4;
}

constexpr int kAhead = 2048;  // bytes to prefetch ahead, of keys and of values

// Into the L2 cache: the L1 cache has fewer line-fill buffers, which would be the limit.
inline void fetch(const char* at) { _mm_prefetch(at, _MM_HINT_T1); }

inline __m512 even_floats(__m512i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(bf16, 16)); }
inline __m512 odd_floats(__m512i bf16) {
  return _mm512_castsi512_ps(_mm512_and_si512(bf16, _mm512_set1_epi32(int32_t(0xffff0000))));
}

// Readers, one for each type of cache; head_dim = 32 * kSteps. `scores` returns 16 dot products of the query with
// consecutive rows, not yet multiplied by `unit`; `mix` adds weighted rows to the sums, whose order `reorder` restores
// at the end. Both prefetch the rows at `ahead`, except for int8, where the hardware prefetcher alone was faster: it
// reads 4 KB from each of two places in turn.

template <int kSteps>
struct Floats {
  using Stored = float;
  static constexpr int kSums = 2 * kSteps, kGroups = groups_of(128 * kSteps);
  __m512 q[2 * kSteps];
  float unit = 1;

  Floats(const void* query, Type type) {
    float values[32 * kSteps];
    load_query(query, type, 32 * kSteps, values);
    for (int i = 0; i < 2 * kSteps; ++i) q[i] = _mm512_loadu_ps(values + 16 * i);
  }

  __m512 scores(const float* row, const char* ahead) const {
    __m512 sums[16];
    for (int j = 0; j < 16; ++j, row += 32 * kSteps, ahead += 128 * kSteps) {
      sums[j] = _mm512_mul_ps(q[0], _mm512_loadu_ps(row));
      fetch(ahead);
      for (int i = 1; i < 2 * kSteps; ++i) {
        sums[j] = _mm512_fmadd_ps(q[i], _mm512_loadu_ps(row + 16 * i), sums[j]);
        fetch(ahead + 64 * i);
      }
    }
    return sum_each(sums, AddFloats());
  }

  static void mix(const float* row, const float* weights, int count, const char* ahead,
                  __m512 (&sums)[kSums]) {
    for (int j = 0; j < count; ++j, row += 32 * kSteps, ahead += 128 * kSteps) {
      const __m512 weight = _mm512_set1_ps(weights[j]);
      for (int i = 0; i < 2 * kSteps; ++i) {
        sums[i] = _mm512_fmadd_ps(weight, _mm512_loadu_ps(row + 16 * i), sums[i]);
        fetch(ahead + 64 * i);
      }
    }
  }

  static void reorder(float*) {}
};

template <int kSteps>
struct BFloats {
  using Stored = uint16_t;
  static constexpr int kSums = 2 * kSteps, kGroups = groups_of(64 * kSteps);
#if defined(__AVX512BF16__)
  __m512bh q[kSteps];
#else
  __m512 even[kSteps], odd[kSteps];
#endif
  float unit = 1;

  BFloats(const void* query, Type) {
    const uint16_t* values = static_cast<const uint16_t*>(query);
    for (int i = 0; i < kSteps; ++i) {
      const __m512i bits = _mm512_loadu_si512(values + 32 * i);
#if defined(__AVX512BF16__)
      q[i] = (__m512bh)bits;
#else
      even[i] = even_floats(bits);
      odd[i] = odd_floats(bits);
#endif
    }
  }

  __m512 scores(const uint16_t* row, const char* ahead) const {
    __m512 sums[16];
    for (int j = 0; j < 16; ++j, row += 32 * kSteps, ahead += 64 * kSteps) {
      sums[j] = _mm512_setzero_ps();
      for (int i = 0; i < kSteps; ++i) {
        const __m512i key = _mm512_loadu_si512(row + 32 * i);
#if defined(__AVX512BF16__)
        sums[j] = _mm512_dpbf16_ps(sums[j], (__m512bh)key, q[i]);
#else
        sums[j] = _mm512_fmadd_ps(even_floats(key), even[i], sums[j]);
        sums[j] = _mm512_fmadd_ps(odd_floats(key), odd[i], sums[j]);
#endif
        fetch(ahead + 64 * i);
      }
    }
    return sum_each(sums, AddFloats());
  }

  static void mix(const uint16_t* row, const float* weights, int count, const char* ahead,
                  __m512 (&sums)[kSums]) {
    for (int j = 0; j < count; ++j, row += 32 * kSteps, ahead += 64 * kSteps) {
      const __m512 weight = _mm512_set1_ps(weights[j]);
      for (int i = 0; i < kSteps; ++i) {
        const __m512i value = _mm512_loadu_si512(row + 32 * i);
        sums[2 * i] = _mm512_fmadd_ps(weight, even_floats(value), sums[2 * i]);
        sums[2 * i + 1] = _mm512_fmadd_ps(weight, odd_floats(value), sums[2 * i + 1]);
        fetch(ahead + 64 * i);
      }
    }
  }

  static void reorder(float* sums) {
    const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int i = 0; i < kSteps; ++i, sums += 32) {
      const __m512 even = _mm512_loadu_ps(sums), odd = _mm512_loadu_ps(sums + 16);
      _mm512_storeu_ps(sums, _mm512_permutex2var_ps(even, low, odd));
      _mm512_storeu_ps(sums + 16, _mm512_permutex2var_ps(even, high, odd));
    }
  }
};

// The query is quantised to 16-bit integers, as separate high and low bytes: products are exact in int32, and the
// rounding error of the query is smaller than bfloat16's.
template <int kSteps>
struct Bytes {
  using Stored = int8_t;
  static constexpr int kVectors = (kSteps + 1) / 2, kSums = 4 * kVectors;
  static constexpr int kGroups = groups_of(32 * kSteps);
  static constexpr __mmask64 kLast = kSteps % 2 ? 0xffffffff : ~uint64_t(0);
  __m512i high[kVectors], low[kVectors], offset;
  float unit;

  Bytes(const void* query, Type type) {
    float values[32 * kSteps];
    load_query(query, type, 32 * kSteps, values);
    float largest = 0, poison = 0;
    for (const float value : values) {
      largest = std::fabs(value) > largest ? std::fabs(value) : largest;
      poison += 0.0f * value;  // NaN where the query holds NaN or infinity
    }
    constexpr float kLargest = 127 * 256;
    const bool usable = poison == 0 && largest > kLargest * std::numeric_limits<float>::min();
    const float inverse = usable ? kLargest / largest : 0.0f;
    alignas(64) int8_t bytes[2][64 * kVectors] = {};
    int32_t sum = 0;
    for (int d = 0; d < 32 * kSteps; ++d) {
      const int32_t value = usable ? int32_t(std::nearbyintf(values[d] * inverse)) : 0;
      const int32_t upper = (value + 128) >> 8;
      bytes[0][d] = int8_t(upper);
      bytes[1][d] = int8_t(value - upper * 256);
      sum += value;
    }
    for (int i = 0; i < kVectors; ++i) {
      high[i] = _mm512_load_si512(bytes[0] + 64 * i);
      low[i] = _mm512_load_si512(bytes[1] + 64 * i);
    }
    // Keys are read as unsigned, with 128 added. The first lane's initial value removes that from the sum of lanes.
    offset = _mm512_maskz_set1_epi32(1, -128 * sum);
    unit = usable ? largest / kLargest : poison;
  }

  static __m512i load(const int8_t* row, int i) {
    return i + 1 < kVectors ? _mm512_loadu_si512(row + 64 * i)
                            : _mm512_maskz_loadu_epi8(kLast, row + 64 * i);
  }

  __m512 scores(const int8_t* row, const char*) const {
    __m512 sums[16];
    const __m512i sign = _mm512_set1_epi8(int8_t(0x80));
    for (int j = 0; j < 16; ++j, row += 32 * kSteps) {
      __m512i keys[kVectors], sum = _mm512_setzero_si512();
      for (int i = 0; i < kVectors; ++i) {
        keys[i] = _mm512_xor_si512(load(row, i), sign);
        sum = _mm512_dpbusd_epi32(sum, keys[i], high[i]);
      }
      sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), offset);
      for (int i = 0; i < kVectors; ++i) sum = _mm512_dpbusd_epi32(sum, keys[i], low[i]);
      sums[j] = _mm512_castsi512_ps(sum);
    }
    return _mm512_cvtepi32_ps(_mm512_castps_si512(sum_each(sums, AddIntegers())));
  }

  // Weights are quantised to 16-bit integers too, relative to the largest. Four rows are interleaved and multiplied by
  // four weights in one instruction; converting every value to float would be the limit.
  static void mix(const int8_t* row, const float* weights, int count, const char*,
                  __m512 (&sums)[kSums]) {
    alignas(16) uint8_t upper[kGroups * kKeyGroup], lower[kGroups * kKeyGroup];
    __m512 largest = _mm512_setzero_ps();
    __mmask16 poisoned = 0;
    const int groups = (count + kKeyGroup - 1) / kKeyGroup;
    for (int g = 0; g < groups; ++g) {
      const __m512 weight = _mm512_load_ps(weights + g * kKeyGroup);
      largest = _mm512_max_ps(largest, weight);
      poisoned |= _mm512_cmp_ps_mask(weight, weight, _CMP_UNORD_Q);
    }
    const float maximum = _mm512_reduce_max_ps(largest);
    const bool usable = maximum > 65535 * std::numeric_limits<float>::min();
    const __m512 inverse = _mm512_set1_ps(usable ? 65535.0f / maximum : 0.0f);
    for (int g = 0; g < groups; ++g) {
      const __m512i whole =
          _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_load_ps(weights + g * kKeyGroup), inverse));
      _mm_store_si128(reinterpret_cast<__m128i*>(upper + g * kKeyGroup),
                      _mm512_cvtepi32_epi8(_mm512_srli_epi32(whole, 8)));
      _mm_store_si128(reinterpret_cast<__m128i*>(lower + g * kKeyGroup), _mm512_cvtepi32_epi8(whole));
    }
    __m512i products[2][4 * kVectors];
    for (auto& half : products)
      for (__m512i& product : half) product = _mm512_setzero_si512();
    for (int j = 0; j < count; j += 4, row += 4 * 32 * kSteps) {
      const __m512i high = four(upper + j), low = four(lower + j);
      for (int i = 0; i < kVectors; ++i) {
        const __m512i a = load(row, i), b = load(row + 32 * kSteps, i);
        const __m512i c = load(row + 64 * kSteps, i), d = load(row + 96 * kSteps, i);
        const __m512i ab0 = _mm512_unpacklo_epi8(a, b), ab1 = _mm512_unpackhi_epi8(a, b);
        const __m512i cd0 = _mm512_unpacklo_epi8(c, d), cd1 = _mm512_unpackhi_epi8(c, d);
        const __m512i woven[4] = {_mm512_unpacklo_epi16(ab0, cd0), _mm512_unpackhi_epi16(ab0, cd0),
                                  _mm512_unpacklo_epi16(ab1, cd1), _mm512_unpackhi_epi16(ab1, cd1)};
        for (int k = 0; k < 4; ++k) {
          products[0][4 * i + k] = _mm512_dpbusd_epi32(products[0][4 * i + k], high, woven[k]);
          products[1][4 * i + k] = _mm512_dpbusd_epi32(products[1][4 * i + k], low, woven[k]);
        }
      }
    }
    const __m512 unit =
        _mm512_set1_ps(poisoned ? std::numeric_limits<float>::quiet_NaN() : maximum / 65535.0f);
    for (int i = 0; i < 4 * kVectors; ++i) {
      const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(products[0][i], 8), products[1][i]);
      sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(both), unit, sums[i]);
    }
  }

  static __m512i four(const uint8_t* from) {
    int32_t bytes;
    std::memcpy(&bytes, from, 4);
    return _mm512_set1_epi32(bytes);
  }

  // Undoes the interleaving, which leaves four columns of each sixteen adjacent.
  static void reorder(float* sums) {
    float ordered[16 * kSums];
    for (int i = 0; i < kSums; ++i)
      for (int k = 0; k < 16; ++k)
        ordered[i / 4 * 64 + k / 4 * 16 + i % 4 * 4 + k % 4] = sums[16 * i + k];
    std::memcpy(sums, ordered, sizeof(ordered));
  }
};

// One head's query against up to Reader::kGroups groups of positions, whose rows are consecutive.
template <class Reader, int kSteps, class Stored>
inline void attend(const Reader& reader, const Stored* keys, const Stored* values, const float* key_scales,
                   const float* value_scales, int count, const char* keys_ahead, const char* values_ahead,
                   Part& part) {
  constexpr bool kScaled = sizeof(Stored) == 1;
  constexpr int kGroups = Reader::kGroups;
  constexpr int kGroup = kKeyGroup * 32 * kSteps;
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  const __m512 unit = _mm512_set1_ps(reader.unit * kLog2e / std::sqrt(32.0f * kSteps));
  alignas(64) float weights[kGroups * kKeyGroup];
  __m512 largest = _mm512_set1_ps(part.maximum);
  const int groups = (count + kKeyGroup - 1) / kKeyGroup;
  for (int g = 0; g < groups; ++g) {
    __m512 scores = _mm512_mul_ps(
        reader.scores(keys + g * kGroup, keys_ahead + g * kGroup * int(sizeof(Stored))), unit);
    if constexpr (kScaled) scores = _mm512_mul_ps(scores, _mm512_loadu_ps(key_scales + g * kKeyGroup));
    const int left = count - g * kKeyGroup;
    if (left < kKeyGroup) scores = _mm512_mask_mov_ps(none, __mmask16((1 << left) - 1), scores);
    largest = _mm512_max_ps(largest, scores);
    _mm512_store_ps(weights + g * kKeyGroup, scores);
  }
  largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  const __m512 shrink = exp2_below_zero(_mm512_sub_ps(_mm512_set1_ps(part.maximum), largest));
  __m512 total = _mm512_setzero_ps();
  for (int g = 0; g < groups; ++g) {
    __m512 weight = exp2_below_zero(_mm512_sub_ps(_mm512_load_ps(weights + g * kKeyGroup), largest));
    total = _mm512_add_ps(total, weight);
    if constexpr (kScaled) {  // the scale of a place that is not in use may be anything
      const int left = count - g * kKeyGroup;
      const __mmask16 used = __mmask16(left < kKeyGroup ? (1 << left) - 1 : 0xffff);
      weight = _mm512_maskz_mul_ps(used, weight, _mm512_loadu_ps(value_scales + g * kKeyGroup));
    }
    _mm512_store_ps(weights + g * kKeyGroup, weight);
  }
  part.maximum = _mm512_cvtss_f32(largest);
  part.total = part.total * _mm512_cvtss_f32(shrink) + _mm512_reduce_add_ps(total);
  __m512 sums[Reader::kSums];
  for (int i = 0; i < Reader::kSums; ++i)
    sums[i] = _mm512_mul_ps(_mm512_loadu_ps(part.sums + 16 * i), shrink);
  Reader::mix(values, weights, count, values_ahead, sums);
  for (int i = 0; i < Reader::kSums; ++i) _mm512_storeu_ps(part.sums + 16 * i, sums[i]);
}

template <class Reader, int kSteps>
void decode_of(const PagedCache& cache, const int32_t* blocks, int begin, int end, const Rows& queries,
               int64_t query, Part* parts) {
  using Stored = typename Reader::Stored;
  constexpr int kHeadDim = 32 * kSteps;
  constexpr int kPositions = Reader::kGroups * kKeyGroup;
  constexpr int kDistance = kAhead / int(sizeof(Stored));
  std::vector<Reader> readers;
  readers.reserve(size_t(cache.heads));
  for (int head = 0; head < cache.heads; ++head)
    readers.emplace_back(queries.at(query, head), queries.type);
  clear(parts, cache.heads, 16 * Reader::kSums);
  const int64_t size = int64_t(cache.heads) * cache.block_size * kHeadDim;
  for (int at = begin; at < end; at += cache.block_size) {
    const int32_t block = blocks[at / cache.block_size];
    const int32_t next = at + cache.block_size < end ? blocks[at / cache.block_size + 1] : block;
    const int rows = end - at < cache.block_size ? end - at : cache.block_size;
    for (int head = 0; head < cache.heads; ++head) {
      for (int j = 0; j < rows; j += kPositions) {
        // Prefetch from this block or from the start of the next.
        const int64_t place = (int64_t(head) * cache.block_size + j) * kHeadDim + kDistance;
        const auto ahead = [&](const Pages& pages) {
          const Stored* from = place < size ? cache.row<Stored>(pages, block, 0, 0) + place
                                            : cache.row<Stored>(pages, next, 0, 0) + (place - size);
          return reinterpret_cast<const char*>(from);
        };
        attend<Reader, kSteps, Stored>(
            readers[size_t(head)], cache.row<Stored>(cache.keys, block, head, j),
            cache.row<Stored>(cache.values, block, head, j), cache.scale(cache.keys, block, head, j),
            cache.scale(cache.values, block, head, j),
            rows - j < kPositions ? rows - j : kPositions, ahead(cache.keys),
            ahead(cache.values), parts[head]);
      }
    }
  }
  for (int head = 0; head < cache.heads; ++head) Reader::reorder(parts[head].sums);
}

void decode(const PagedCache& cache, const int32_t* blocks, int begin, int end, const Rows& queries,
            int64_t query, Part* parts) {
  using Decode = void (*)(const PagedCache&, const int32_t*, int, int, const Rows&, int64_t, Part*);
  constexpr Decode kinds[4][3] = {
      {decode_of<Floats<1>, 1>, decode_of<BFloats<1>, 1>, decode_of<Bytes<1>, 1>},
      {decode_of<Floats<2>, 2>, decode_of<BFloats<2>, 2>, decode_of<Bytes<2>, 2>},
      {decode_of<Floats<3>, 3>, decode_of<BFloats<3>, 3>, decode_of<Bytes<3>, 3>},
      {decode_of<Floats<4>, 4>, decode_of<BFloats<4>, 4>, decode_of<Bytes<4>, 4>}};
  const int steps = cache.head_dim / 32;
  if (steps > 4) return generic_decode(cache, blocks, begin, end, queries, query, parts);
  kinds[steps - 1][cache.type](cache, blocks, begin, end, queries, query, parts);
}

}  // namespace

namespace xv {
#if defined(__AVX512BF16__)
const AttentionKernels kAttentionAvx512Bf16 = {decode, generic_append, prefill_avx512_bf16};
#else
const AttentionKernels kAttentionAvx512 = {decode, generic_append, prefill_lanes};
#endif
}  // namespace xv
#endif
