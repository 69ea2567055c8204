// The steps between the matrix products, each in one pass: norm, rotary embedding, gated activation. Computed in
// float32 and rounded once at the end. Plain C++ in an unnamed namespace, as generic.h.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace {

using namespace xv;

inline float load(const float* x) { return *x; }
inline float load(const uint16_t* x) { return to_float(*x); }
inline void save(float* y, float value) { *y = value; }
inline void save(uint16_t* y, float value) { *y = to_bfloat16(value); }

// e^x to about two units in the last place: 2^n times a polynomial (coefficients of Cephes) of the remainder.
inline float exponential(float x) {
  x = x > 88.0f ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float n = nearest(x * 1.44269504f);
  float r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return p * power;
}

template <class T, class W>
void rms_norm_rows(const T* x, const W* weight, T* y, int64_t rows, int size, float eps) {
  constexpr int kLanes = 32;
  for (int64_t row = 0; row < rows; ++row, x += size, y += size) {
    float sums[kLanes] = {};
    int i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int j = 0; j < kLanes; ++j) sums[j] += load(x + i + j) * load(x + i + j);
    for (; i < size; ++i) sums[0] += load(x + i) * load(x + i);
    float sum = 0;
    for (int j = 0; j < kLanes; ++j) sum += sums[j];
    const float scale = 1.0f / std::sqrt(sum / float(size) + eps);
    for (int k = 0; k < size; ++k) save(y + k, load(x + k) * scale * load(weight + k));
  }
}

[[maybe_unused]] void generic_rms_norm(const void* x, const void* weight, void* y, Type type, Type weight_type,
                                       int64_t rows, int size, float eps) {
  const auto with = [&](auto* from, auto* to) {
    if (weight_type == kFloat32)
      rms_norm_rows(from, static_cast<const float*>(weight), to, rows, size, eps);
    else
      rms_norm_rows(from, static_cast<const uint16_t*>(weight), to, rows, size, eps);
  };
  if (type == kFloat32)
    with(static_cast<const float*>(x), static_cast<float*>(y));
  else
    with(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(y));
}

template <class T>
void silu_mul_all(const T* gate, const T* up, T* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float value = load(gate + i);
    save(y + i, value / (1.0f + exponential(-value)) * load(up + i));
  }
}

[[maybe_unused]] void generic_silu_mul(const void* gate, const void* up, void* y, Type type, int64_t count) {
  if (type == kFloat32)
    silu_mul_all(static_cast<const float*>(gate), static_cast<const float*>(up), static_cast<float*>(y), count);
  else
    silu_mul_all(static_cast<const uint16_t*>(gate), static_cast<const uint16_t*>(up),
                 static_cast<uint16_t*>(y), count);
}

template <class T>
void rotate_token(T* x, const T* cos, const T* sin, int heads, int head_dim) {
  const int half = head_dim / 2;
  for (int h = 0; h < heads; ++h, x += head_dim) {
    for (int i = 0; i < half; ++i) {
      const float first = load(x + i), second = load(x + half + i);
      save(x + i, first * load(cos + i) - second * load(sin + i));
      save(x + half + i, second * load(cos + half + i) + first * load(sin + half + i));
    }
  }
}

// One token's heads [heads, head_dim], in place, by its row of the tables [head_dim].
[[maybe_unused]] void generic_rotate(void* x, const void* cos, const void* sin, Type type, int heads,
                                     int head_dim) {
  if (type == kFloat32)
    rotate_token(static_cast<float*>(x), static_cast<const float*>(cos), static_cast<const float*>(sin), heads,
                 head_dim);
  else
    rotate_token(static_cast<uint16_t*>(x), static_cast<const uint16_t*>(cos),
                 static_cast<const uint16_t*>(sin), heads, head_dim);
}

}  // namespace
