// Rounding weights to groups of integers or of entries of a table: for each group the bfloat16 scale with the smallest
// squared error.
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

struct Integers {
  float low, high;
  explicit Integers(const Levels& levels) : low(-float(1 << (levels.bits - 1))), high(-low - 1.0f) {}
  // Clamped before rounding: the same integer, and small enough for the magic number. NaN stays NaN.
  float value(float x) const {
    x = x < low ? low : x;
    x = x > high ? high : x;
    return (x + kMagic) - kMagic;
  }
  int8_t index(float x) const { return int8_t(value(x)); }
};

struct Table {
  const float* values;
  const int8_t* indices;
  explicit Table(const Levels& levels) : values(levels.values), indices(levels.indices) {}
  // Moved by the range, so that the conversion to an integer, which truncates, rounds down. NaN becomes the first entry.
  static int place(float x) {
    x = x * 2.0f + float(kTableRange);
    x = x > 0.0f ? x : 0.0f;
    x = x < float(2 * kTableRange - 1) ? x : float(2 * kTableRange - 1);
    return int(x);
  }
  float value(float x) const { return values[place(x)]; }
  int8_t index(float x) const { return indices[place(x)]; }
};

inline float sum(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) lanes[j] += lanes[j + half];
  }
  return lanes[0];
}

template <class Grid>
inline float squared_error(const Grid& grid, const float* w, const float* importance, int group, float scale) {
  const float inverse = reciprocal(scale);
  float lanes[kLanes] = {};
  for (int k = 0; k < group; k += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float off = w[k + j] - grid.value(w[k + j] * inverse) * scale;
      lanes[j] += off * off * importance[k + j];
    }
  }
  return sum(lanes);
}

template <class Grid>
inline float least_squares(const Grid& grid, const float* w, const float* importance, int group, float scale) {
  const float inverse = reciprocal(scale);
  float above[kLanes] = {}, below[kLanes] = {};
  for (int k = 0; k < group; k += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      const float q = grid.value(w[k + j] * inverse);
      above[j] += w[k + j] * q * importance[k + j];
      below[j] += q * q * importance[k + j];
    }
  }
  const float numerator = sum(above), denominator = sum(below);
  return denominator > 0.0f ? numerator / denominator : 0.0f;
}

template <class Grid>
void round_row(const Grid& grid, const Rounding& settings, const float* weight, const float* importance, int8_t* q,
               uint16_t* scales) {
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
      const float error = squared_error(grid, w, h, settings.group, scale);
      if (error < best_error) best_error = error, best = scale;
    };
    for (int i = 0; i < settings.count; ++i) {
      const float scale = to_float(to_bfloat16(largest / settings.divisors[i]));
      offer(scale);
      offer(-scale);
    }
    for (int i = 0; i < 2; ++i)
      offer(to_float(to_bfloat16(least_squares(grid, w, h, settings.group, best))));
    const float inverse = reciprocal(best);
    for (int k = 0; k < settings.group; ++k) q[start + k] = grid.index(w[k] * inverse);
    scales[start / settings.group] = to_bfloat16(best);
  }
}

template <class Grid>
void round_columns(const Grid& grid, const Columns& columns, const float* weight, float* shift, const float* scales,
                   int8_t* q, float* errors) {
  const int count = columns.count;
  for (int k = 0; k < count; ++k) {
    const float scale = scales[columns.group_of[k]];
    const float moved = (weight[k] + shift[k]) * reciprocal(scale);
    const float error = weight[k] - grid.value(moved) * scale;
    q[k] = grid.index(moved);
    errors[k] = error;
    const float* share = columns.feedback + int64_t(k) * count;
    for (int j = k & ~15; j < count; ++j) shift[j] += error * share[j];  // shares of columns up to k are not used again
  }
}

}  // namespace

void XV_ROUND(const Rounding& settings, const float* weight, const float* importance, int8_t* q, uint16_t* scales) {
  if (settings.levels.values) {
    round_row(Table(settings.levels), settings, weight, importance, q, scales);
  } else {
    round_row(Integers(settings.levels), settings, weight, importance, q, scales);
  }
}

void XV_JOIN(XV_ROUND, _columns)(const Columns& columns, const float* weight, float* shift, const float* scales,
                                 int8_t* q, float* errors) {
  if (columns.levels.values) {
    round_columns(Table(columns.levels), columns, weight, shift, scales, q, errors);
  } else {
    round_columns(Integers(columns.levels), columns, weight, shift, scales, q, errors);
  }
}

}  // namespace xv
