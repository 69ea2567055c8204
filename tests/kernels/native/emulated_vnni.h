// AVX-VNNI's instruction on a processor that only has AVX2, for tests; included before csrc/avx2.cpp.
#pragma once
#include <immintrin.h>

// sums + products of four unsigned bytes of `a` and four signed ones of `b`, which 16 bits cannot hold.
static inline __m256i emulated_dpbusd(__m256i sums, __m256i a, __m256i b) {
  const __m256i a_even = _mm256_and_si256(a, _mm256_set1_epi16(255)), a_odd = _mm256_srli_epi16(a, 8);
  const __m256i b_even = _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8), b_odd = _mm256_srai_epi16(b, 8);
  const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(a_even, b_even), _mm256_madd_epi16(a_odd, b_odd));
  return _mm256_add_epi32(sums, products);
}

#define _mm256_dpbusd_avx_epi32 emulated_dpbusd
#define __AVXVNNI__ 1
