// Rounding weights to groups of integers: for each group the bfloat16 scale with the smallest squared error.
//
// Compiled once for each instruction set (XV_ROUND names the function). All of them, and the PyTorch version in
// quant/methods.py, give the same bits: no fused multiply-add (-ffp-contract=off), sums over fixed lanes.
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"

namespace xv {

struct Rounding {
  int64_t inputs;
  int bits, group;
  const float* divisors;  // what a group's largest magnitude is divided by, one trial each
  int count;
};

using RoundRow = void (*)(const Rounding& how, const float* weight, const float* importance, int8_t* q,
                          uint16_t* scales);

void round_portable(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
#if defined(__x86_64__)
void round_avx2(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
void round_avx512(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
#endif

namespace {

constexpr int kLanes = 32;          // every group size is a multiple
constexpr float kSmallest = 1e-30f; // a group below it becomes zeros: the reciprocal would overflow
constexpr float kMagic = 12582912.0f; // adding 1.5 * 2^23 rounds to the nearest integer, ties to even

inline float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Clamped first: the same integer, and small enough for the magic number. NaN stays NaN.
inline float integer(float weight, float inverse, float low, float high) {
  float x = weight * inverse;
  x = x < low ? low : x;
  x = x > high ? high : x;
  return (x + kMagic) - kMagic;
}

inline float sum(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

inline float squared_error(const float* w, const float* importance, int group, float scale, float low,
                           float high) {
  const float inverse = reciprocal(scale);
  float lanes[kLanes] = {};
  for (int k = 0; k < group; k += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float off = w[k + j] - integer(w[k + j], inverse, low, high) * scale;
      lanes[j] += off * off * importance[k + j];
    }
  }
  return sum(lanes);
}

inline float least_squares(const float* w, const float* importance, int group, float scale, float low,
                           float high) {
  const float inverse = reciprocal(scale);
  float above[kLanes] = {}, below[kLanes] = {};
  for (int k = 0; k < group; k += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float q = integer(w[k + j], inverse, low, high);
      above[j] += w[k + j] * q * importance[k + j];
      below[j] += q * q * importance[k + j];
    }
  }
  const float numerator = sum(above), denominator = sum(below);
  return denominator > 0.0f ? numerator / denominator : 0.0f;
}

}  // namespace

void XV_ROUND(const Rounding& how, const float* weight, const float* importance, int8_t* q,
              uint16_t* scales) {
  const float high = float((1 << (how.bits - 1)) - 1), low = -high - 1.0f;
  for (int64_t start = 0; start < how.inputs; start += how.group) {
    const float* w = weight + start;
    const float* h = importance + start;
    float lanes[kLanes] = {};
    bool finite = true;
    for (int k = 0; k < how.group; k += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float magnitude = w[k + j] < 0.0f ? -w[k + j] : w[k + j];
        lanes[j] = magnitude > lanes[j] ? magnitude : lanes[j];
      }
    }
    float largest = 0.0f, total = 0.0f;
    for (int j = 0; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
    for (int k = 0; k < how.group; ++k) total += w[k] * 0.0f;  // NaN where a weight is NaN or infinite
    finite = total == 0.0f;
    if (!finite) {
      scales[start / how.group] = 0x7fc0;
      std::memset(q + start, 0, size_t(how.group));
      continue;
    }
    if (largest < kSmallest) largest = 0.0f;
    float best = to_float(to_bfloat16(largest / how.divisors[0]));
    float best_error = __builtin_inff();
    const auto offer = [&](float scale) {
      const float error = squared_error(w, h, how.group, scale, low, high);
      if (error < best_error) best_error = error, best = scale;
    };
    for (int i = 0; i < how.count; ++i) {
      const float scale = to_float(to_bfloat16(largest / how.divisors[i]));
      offer(scale);
      offer(-scale);
    }
    for (int i = 0; i < 2; ++i)
      offer(to_float(to_bfloat16(least_squares(w, h, how.group, best, low, high))));
    const float inverse = reciprocal(best);
    for (int k = 0; k < how.group; ++k) q[start + k] = int8_t(integer(w[k], inverse, low, high));
    scales[start / how.group] = to_bfloat16(best);
  }
}

}  // namespace xv

#if defined(XV_ROUND_API)

using namespace xv;

// Quantised rows q int8 [rows, inputs] and scales bfloat16 [rows, inputs / group] of `weight` float32.
// `importance` [inputs] weighs the squared error of each input.
extern "C" void xv_round(const float* weight, const float* importance, int8_t* q, uint16_t* scales,
                         int64_t rows, int64_t inputs, int bits, int group, const float* divisors, int count,
                         int threads) {
  RoundRow round_row = round_portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) round_row = round_avx2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")) round_row = round_avx512;
#endif
  const Rounding how{inputs, bits, group, divisors, count};
  const int64_t groups = inputs / group;
  share(rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      round_row(how, weight + row * inputs, importance, q + row * inputs, scales + row * groups);
  });
}

#endif
