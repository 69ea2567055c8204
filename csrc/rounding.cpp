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
  // The levels of kLanes values. Clamped before rounding: the same integer, and small enough for the magic number. NaN
  // stays NaN.
  void values(const float* x, float* y) const {
    for (int j = 0; j < kLanes; ++j) y[j] = value(x[j]);
  }
  float value(float x) const {
    x = x < low ? low : x;
    x = x > high ? high : x;
    return (x + kMagic) - kMagic;
  }
  int8_t index(float x) const { return int8_t(value(x)); }
};

// Eight lanes: compilers find no vectors in the search below, and split these where registers are smaller.
typedef float Floats __attribute__((vector_size(32)));
typedef int32_t Ints __attribute__((vector_size(32)));

// The nearest entry is found by comparing with every middle between two entries, from which on the upper one is taken.
// NaN becomes the first entry.
template <int kBits>
struct Table {
  static constexpr int kEntries = 1 << kBits;
  float first, middles[kEntries - 1], steps[kEntries - 1];
  explicit Table(const Levels& levels) : first(levels.table[0]) {
    for (int i = 1; i < kEntries; ++i) {
      middles[i - 1] = 0.5f * float(levels.table[i - 1] + levels.table[i]);
      steps[i - 1] = float(levels.table[i] - levels.table[i - 1]);
    }
  }
  void values(const float* x, float* y) const {
    for (int j = 0; j < kLanes; j += 8) {
      Floats lanes, nearest = Floats{} + first;
      std::memcpy(&lanes, x + j, sizeof lanes);
      for (int i = 0; i < kEntries - 1; ++i) {
        const Ints above = lanes >= Floats{} + middles[i];
        nearest += (Floats)(above & (Ints)(Floats{} + steps[i]));
      }
      std::memcpy(y + j, &nearest, sizeof nearest);
    }
  }
  float value(float x) const {
    float y = first;
    for (int i = 0; i < kEntries - 1; ++i) y += x >= middles[i] ? steps[i] : 0.0f;
    return y;
  }
  int8_t index(float x) const {
    int count = 0;
    for (int i = 0; i < kEntries - 1; ++i) count += x >= middles[i];
    return int8_t(count - kEntries / 2);
  }
};

// Calls f with the levels' grid.
template <class F>
inline void with_grid(const Levels& levels, const F& f) {
  if (!levels.table) return f(Integers(levels));
  if (levels.bits == 4) return f(Table<4>(levels));
  if (levels.bits == 3) return f(Table<3>(levels));
  return f(Table<2>(levels));
}

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
    float x[kLanes], q[kLanes];
    for (int j = 0; j < kLanes; ++j) x[j] = w[k + j] * inverse;
    grid.values(x, q);
    for (int j = 0; j < kLanes; ++j) {
      const float off = w[k + j] - q[j] * scale;
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
    float x[kLanes], q[kLanes];
    for (int j = 0; j < kLanes; ++j) x[j] = w[k + j] * inverse;
    grid.values(x, q);
    for (int j = 0; j < kLanes; ++j) {
      above[j] += w[k + j] * q[j] * importance[k + j];
      below[j] += q[j] * q[j] * importance[k + j];
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
  with_grid(settings.levels,
            [&](const auto& grid) { round_row(grid, settings, weight, importance, q, scales); });
}

void XV_JOIN(XV_ROUND, _columns)(const Columns& columns, const float* weight, float* shift, const float* scales,
                                 int8_t* q, float* errors) {
  with_grid(columns.levels,
            [&](const auto& grid) { round_columns(grid, columns, weight, shift, scales, q, errors); });
}

}  // namespace xv
