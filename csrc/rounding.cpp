// Rounding weights to groups of integers: for each group the bfloat16 scale with the smallest squared error.
//
// Compiled once for each instruction set (XV_ROUND names the functions). All of them, and the PyTorch version in
// quant/methods.py, give the same bits: no fused multiply-add (-ffp-contract=off), sums in a fixed order of lanes.
#include "rounding.h"

#include <cstring>

#include "kernels.h"

#define XV_JOIN(name, suffix) XV_JOIN_NAMES(name, suffix)
#define XV_JOIN_NAMES(name, suffix) name##suffix

namespace xv {

namespace {

constexpr int kLanes = 32;          // every group size is a multiple
constexpr float kSmallest = 1e-30f; // groups below it become zeros: the reciprocal would overflow
constexpr float kMagic = 12582912.0f; // adding 1.5 * 2^23 rounds to the nearest integer, ties to even

inline float reciprocal(float scale) { return scale == 0.0f ? 0.0f : 1.0f / scale; }

// Clamped before rounding: the same integer, and small enough for the magic number. NaN stays NaN.
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

void XV_ROUND(const Rounding& settings, const float* weight, const float* importance, int8_t* q, uint16_t* scales) {
  const float high = float((1 << (settings.bits - 1)) - 1), low = -high - 1.0f;
  for (int64_t start = 0; start < settings.inputs; start += settings.group) {
    const float* w = weight + start;
    const float* h = importance + start;
    float lanes[kLanes] = {};
    bool finite = true;
    for (int k = 0; k < settings.group; k += kLanes) {
      for (int j = 0; j < kLanes; ++j) {
        const float magnitude = w[k + j] < 0.0f ? -w[k + j] : w[k + j];
        lanes[j] = magnitude > lanes[j] ? magnitude : lanes[j];
      }
    }
    float largest = 0.0f, total = 0.0f;
    for (int j = 0; j < kLanes; ++j) largest = lanes[j] > largest ? lanes[j] : largest;
    for (int k = 0; k < settings.group; ++k) total += w[k] * 0.0f;  // NaN if a weight is NaN or infinite
    finite = total == 0.0f;
    if (!finite) {
      scales[start / settings.group] = 0x7fc0;
      std::memset(q + start, 0, size_t(settings.group));
      continue;
    }
    if (largest < kSmallest) largest = 0.0f;
    float best = to_float(to_bfloat16(largest / settings.divisors[0]));
    float best_error = __builtin_inff();
    const auto offer = [&](float scale) {
      const float error = squared_error(w, h, settings.group, scale, low, high);
      if (error < best_error) best_error = error, best = scale;
    };
    for (int i = 0; i < settings.count; ++i) {
      const float scale = to_float(to_bfloat16(largest / settings.divisors[i]));
      offer(scale);
      offer(-scale);
    }
    for (int i = 0; i < 2; ++i)
      offer(to_float(to_bfloat16(least_squares(w, h, settings.group, best, low, high))));
    const float inverse = reciprocal(best);
    for (int k = 0; k < settings.group; ++k) q[start + k] = int8_t(integer(w[k], inverse, low, high));
    scales[start / settings.group] = to_bfloat16(best);
  }
}

void XV_JOIN(XV_ROUND, _columns)(const Columns& columns, const float* weight, float* shift, const float* scales,
                                 int8_t* q, float* errors) {
  const float high = float((1 << (columns.bits - 1)) - 1), low = -high - 1.0f;
  const int count = columns.count;
  for (int k = 0; k < count; ++k) {
    const float scale = scales[columns.group_of[k]];
    const float rounded = integer(weight[k] + shift[k], reciprocal(scale), low, high);
    const float error = weight[k] - rounded * scale;
    q[k] = int8_t(rounded);
    errors[k] = error;
    const float* share = columns.feedback + int64_t(k) * count;
    for (int j = k & ~15; j < count; ++j) shift[j] += error * share[j];  // shares of columns up to k are not used again
  }
}

}  // namespace xv
