// The AVX-512 instructions of csrc/avx512.cpp on a processor that has AVX2 only, for tests; included before it. A vector of
// 64 bytes is several registers to the compiler.
#pragma once
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

typedef uint16_t Shorts __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <class To, class From>
inline To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
template <class To, class Function>
inline To each(int count, const Function& function) {
  To to{};
  for (int i = 0; i < count; ++i) to[i] = function(i);
  return to;
}
template <class To>
inline To load(const void* from) {
  To to;
  std::memcpy(&to, from, sizeof(to));
  return to;
}
inline __m512i ints(Ints x) { return as<__m512i>(x); }
inline __m512 floats(Floats x) { return as<__m512>(x); }

inline __m512i shuffle(__m512i table, __m512i indices) {
  int8_t from[64], to[64];
  uint8_t at[64];
  std::memcpy(from, &table, 64), std::memcpy(at, &indices, 64);
  for (int i = 0; i < 64; ++i) to[i] = at[i] & 128 ? 0 : from[i / 16 * 16 + at[i] % 16];
  return load<__m512i>(to);
}
template <class From>
inline void store(void* to, const From& x) {
  static_assert(sizeof(x) == 64);
  std::memcpy(to, &x, 64);
}
inline __m512i repeat(__m128i x) {
  __m128i parts[4] = {x, x, x, x};
  return load<__m512i>(parts);
}
inline __m512i largest(__m512i a, __m512i b) {
  const Ints x = as<Ints>(a), y = as<Ints>(b);
  return ints(each<Ints>(16, [&](int i) { return x[i] > y[i] ? x[i] : y[i]; }));
}
inline __m512 multiply_add(__m512 a, __m512 b, __m512 c) {
  const Floats x = as<Floats>(a), y = as<Floats>(b), z = as<Floats>(c);
  return floats(each<Floats>(16, [&](int i) { return std::fma(x[i], y[i], z[i]); }));
}
template <class Narrow, class From>
inline __m512i widen(const From& from) {
  static_assert(sizeof(From) == 16 * sizeof(Narrow));
  Narrow narrow[16];
  std::memcpy(narrow, &from, sizeof(narrow));
  return ints(each<Ints>(16, [&](int i) { return int32_t(narrow[i]); }));
}
inline __m128i narrow(__m512i x) {
  int8_t bytes[16];
  for (int i = 0; i < 16; ++i) bytes[i] = int8_t(as<Ints>(x)[i]);
  return load<__m128i>(bytes);
}
inline __m512i round(unsigned mask, __m512 x) {
  const Floats from = as<Floats>(x);
  return ints(each<Ints>(16, [&](int i) { return mask >> i & 1 ? int32_t(std::nearbyintf(from[i])) : 0; }));
}
template <class Function>
inline int32_t reduce(__m512i x, const Function& function) {
  const Ints from = as<Ints>(x);
  int32_t result = from[0];
  for (int i = 1; i < 16; ++i) result = function(result, from[i]);
  return result;
}
// The bits of `choices` by one bit of each operand, the first the most significant.
inline __m512i ternary(__m512i a, __m512i b, __m512i c, int choices) {
  Ints result{};
  const Ints x = as<Ints>(a), y = as<Ints>(b), z = as<Ints>(c);
  for (int i = 0; i < 8; ++i)
    if (choices >> i & 1) result |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
  return ints(result);
}
// vpdpbusd: products of four unsigned bytes of `w` with four signed ones from memory.
inline void dot(__m512i& sums, __m512i w, const int8_t* x) {
  uint8_t bytes[64];
  std::memcpy(bytes, &w, 64);
  Ints to = as<Ints>(sums);
  for (int i = 0; i < 64; ++i) to[i / 4] += int(bytes[i]) * x[i % 4];
  sums = ints(to);
}

}  // namespace emulated

#define XV_DOT_BROADCAST emulated::dot
#define _mm512_loadu_si512(p) emulated::load<__m512i>(p)
#define _mm512_loadu_ps(p) emulated::load<__m512>(p)
#define _mm512_storeu_ps(p, x) emulated::store(p, x)
#define _mm512_storeu_si512(p, x) emulated::store(p, x)
#define _mm512_setzero_si512() __m512i{}
#define _mm512_setzero_ps() __m512{}
#define _mm512_set1_epi8(x) emulated::ints(emulated::Ints{} + int32_t(0x01010101u * uint8_t(x)))
#define _mm512_set1_epi32(x) emulated::ints(emulated::Ints{} + int32_t(x))
#define _mm512_set1_ps(x) emulated::floats(emulated::Floats{} + (x))
#define _mm512_maskz_broadcast_i32x4(mask, x) emulated::repeat(x)
#define _mm512_and_si512(x, y) emulated::ints(emulated::as<emulated::Ints>(x) & emulated::as<emulated::Ints>(y))
#define _mm512_add_epi32(x, y) emulated::ints(emulated::as<emulated::Ints>(x) + emulated::as<emulated::Ints>(y))
#define _mm512_max_epi32(x, y) emulated::largest(x, y)
#define _mm512_slli_epi32(x, n) emulated::ints(emulated::as<emulated::Ints>(x) << (n))
#define _mm512_srli_epi16(x, n) emulated::as<__m512i>(emulated::as<emulated::Shorts>(x) >> (n))
#define _mm512_shuffle_epi8 emulated::shuffle
#define _mm512_ternarylogic_epi32 emulated::ternary
#define _mm512_mul_ps(x, y) emulated::floats(emulated::as<emulated::Floats>(x) * emulated::as<emulated::Floats>(y))
#define _mm512_fmadd_ps emulated::multiply_add
#define _mm512_castsi512_ps(x) emulated::as<__m512>(x)
#define _mm512_castps_si512(x) emulated::as<__m512i>(x)
#define _mm512_cvtepi32_ps(x) emulated::floats(__builtin_convertvector(emulated::as<emulated::Ints>(x), emulated::Floats))
#define _mm512_cvtepi8_epi32(x) emulated::widen<int8_t>(x)
#define _mm512_cvtepu16_epi32(x) emulated::widen<uint16_t>(x)
#define _mm512_cvtepi32_epi8 emulated::narrow
#define _mm512_maskz_cvtps_epi32 emulated::round
#define _mm512_reduce_add_epi32(x) emulated::reduce(x, [](int32_t a, int32_t b) { return a + b; })
#define _mm512_reduce_max_epi32(x) emulated::reduce(x, [](int32_t a, int32_t b) { return a > b ? a : b; })
