// The table of training.h, compiled once for each instruction set (XV_TRAINING names it): plain C++ that compilers
// vectorise.
#include "training.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "kernels.h"
#include "steps.h"

namespace {

using namespace xv;

constexpr int kLanes = 32;

inline float total(const float* lanes) {
  float half[kLanes / 2];
  for (int j = 0; j < kLanes / 2; ++j) half[j] = lanes[j] + lanes[j + kLanes / 2];
  for (int size = kLanes / 4; size > 0; size /= 2)
    for (int j = 0; j < size; ++j) half[j] += half[j + size];
  return half[0];
}

// Calls body(i, lane) for 0 to count - 1, in runs of kLanes that compilers vectorise.
template <class Body>
inline void in_lanes(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    for (int j = 0; j < kLanes; ++j) body(i + j, j);
  for (; i < count; ++i) body(i, 0);
}

// Rounds without a check for NaN: finite inputs give none, and the float32 losses and norms still show it.
inline uint16_t rounded(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void add(const float* x, const uint16_t* delta, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] + to_float(delta[i]);
}

void accumulate(float* sum, const uint16_t* value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += to_float(value[i]);
}

inline void put(float* to, float value) { *to = value; }
inline void put(uint16_t* to, float value) { *to = rounded(value); }

template <class X>
void norm_rows(const X* x, const uint16_t* delta, const float* weight, X* sum, uint16_t* y, float* scale,
               int64_t rows, int size, float eps) {
  for (int64_t row = 0; row < rows; ++row, x += size, y += size) {
    const X* from = x;
    if (delta != nullptr) {
      for (int i = 0; i < size; ++i) put(sum + i, load(x + i) + to_float(delta[i]));
      from = sum;
      delta += size;
      sum += size;
    }
    float lanes[kLanes] = {};
    in_lanes(size, [&](int64_t i, int j) { lanes[j] += load(from + i) * load(from + i); });
    scale[row] = 1.0f / std::sqrt(total(lanes) / float(size) + eps);
    const float by = scale[row];
    for (int i = 0; i < size; ++i) y[i] = rounded(load(from + i) * by * weight[i]);
  }
}

void norm(const void* x, Type type, const uint16_t* delta, const float* weight, void* sum, uint16_t* y, float* scale,
          int64_t rows, int size, float eps) {
  const auto with = [&](auto* from, auto* to) { norm_rows(from, delta, weight, to, y, scale, rows, size, eps); };
  if (type == kFloat32)
    with(static_cast<const float*>(x), static_cast<float*>(sum));
  else
    with(static_cast<const uint16_t*>(x), static_cast<uint16_t*>(sum));
}

template <class X>
void norm_grad_rows(const uint16_t* dy, const X* dsum, const X* sum, const float* weight, const float* scale, X* dx,
                    uint16_t* ddelta, float* dweight, int64_t rows, int size) {
  for (int64_t row = 0; row < rows; ++row, dy += size, sum += size, dx += size) {
    const float by = scale[row];
    float lanes[kLanes] = {};
    in_lanes(size, [&](int64_t i, int j) { lanes[j] += to_float(dy[i]) * weight[i] * load(sum + i); });
    const float along = total(lanes) * by * by * by / float(size);
    for (int i = 0; i < size; ++i) {
      const float gradient = to_float(dy[i]), other = dsum == nullptr ? 0.0f : load(dsum + i);
      put(dx + i, gradient * weight[i] * by - load(sum + i) * along + other);
      dweight[i] += gradient * load(sum + i) * by;
    }
    if (dsum != nullptr) dsum += size;
    if (ddelta != nullptr) {
      for (int i = 0; i < size; ++i) put(ddelta + i, load(dx + i));
      ddelta += size;
    }
  }
}

void norm_grad(const uint16_t* dy, const void* dsum, const void* sum, Type type, const float* weight,
               const float* scale, void* dx, uint16_t* ddelta, float* dweight, int64_t rows, int size) {
  const auto with = [&](auto* to) {
    using X = std::remove_pointer_t<decltype(to)>;
    norm_grad_rows(dy, static_cast<const X*>(dsum), static_cast<const X*>(sum), weight, scale, to, ddelta, dweight,
                   rows, size);
  };
  if (type == kFloat32)
    with(static_cast<float*>(dx));
  else
    with(static_cast<uint16_t*>(dx));
}

void silu_mul_grad(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate, uint16_t* dup,
                   int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const float gradient = to_float(dy[i]), value = to_float(gate[i]);
    const float sigmoid = 1.0f / (1.0f + exponential(-value));
    dup[i] = rounded(gradient * value * sigmoid);
    dgate[i] = rounded(gradient * to_float(up[i]) * sigmoid * (1.0f + value * (1.0f - sigmoid)));
  }
}

void rotate(const uint16_t* x, const float* cos, const float* sin, uint16_t* y, int head_dim, bool back) {
  if (cos == nullptr) {
    std::memcpy(y, x, sizeof(uint16_t) * size_t(head_dim));
    return;
  }
  const int half = head_dim / 2;
  const float sign = back ? -1.0f : 1.0f;
  for (int i = 0; i < half; ++i) {
    const float first = to_float(x[i]), second = to_float(x[half + i]);
    y[i] = rounded(first * cos[i] - second * sign * sin[i]);
    y[half + i] = rounded(second * cos[i] + first * sign * sin[i]);
  }
}

float softmax(uint16_t* scores, int keys, int first, int last, float scale, float* scratch) {
  const int count = last - first + 1;
  uint16_t* seen = scores + first;
  float most[kLanes];
  for (float& value : most) value = -3.0e38f;
  in_lanes(count, [&](int64_t i, int j) {
    const float value = to_float(seen[i]);
    most[j] = value > most[j] ? value : most[j];
  });
  float largest = most[0];
  for (float value : most) largest = value > largest ? value : largest;
  float lanes[kLanes] = {};
  in_lanes(count, [&](int64_t i, int j) {
    scratch[i] = exponential((to_float(seen[i]) - largest) * scale);
    lanes[j] += scratch[i];
  });
  const float sum = total(lanes), inverse = 1.0f / sum;
  std::memset(scores, 0, sizeof(uint16_t) * size_t(first));
  for (int i = 0; i < count; ++i) seen[i] = rounded(scratch[i] * inverse);
  std::memset(seen + count, 0, sizeof(uint16_t) * size_t(keys - last - 1));
  return largest * scale + std::log(sum);
}

void softmax_grad(uint16_t* scores, uint16_t* dp, int keys, int first, int last, float scale, float log_sum,
                  float* scratch) {
  const int count = last - first + 1;
  uint16_t *seen = scores + first, *gradient = dp + first;
  float lanes[kLanes] = {};
  in_lanes(count, [&](int64_t i, int j) {
    scratch[i] = exponential(to_float(seen[i]) * scale - log_sum);
    lanes[j] += scratch[i] * to_float(gradient[i]);
  });
  const float mean = total(lanes);
  std::memset(scores, 0, sizeof(uint16_t) * size_t(first));
  std::memset(dp, 0, sizeof(uint16_t) * size_t(first));
  for (int i = 0; i < count; ++i) {
    seen[i] = rounded(scratch[i]);
    gradient[i] = rounded(scratch[i] * (to_float(gradient[i]) - mean) * scale);
  }
  std::memset(seen + count, 0, sizeof(uint16_t) * size_t(keys - last - 1));
  std::memset(gradient + count, 0, sizeof(uint16_t) * size_t(keys - last - 1));
}

float cross_entropy(uint16_t* logits, int64_t size, int64_t target, float z, float* scratch) {
  float most[kLanes];
  for (float& value : most) value = -3.0e38f;
  in_lanes(size, [&](int64_t i, int j) {
    const float value = to_float(logits[i]);
    most[j] = value > most[j] ? value : most[j];
  });
  float largest = most[0];
  for (float value : most) largest = value > largest ? value : largest;
  // Partial sums added in double: 100,534 values in 32 float lanes would lose precision.
  double sum = 0;
  constexpr int64_t kStretch = 4096;
  for (int64_t start = 0; start < size; start += kStretch) {
    float lanes[kLanes] = {};
    in_lanes(size - start < kStretch ? size - start : kStretch, [&](int64_t i, int j) {
      scratch[start + i] = exponential(to_float(logits[start + i]) - largest);
      lanes[j] += scratch[start + i];
    });
    sum += double(total(lanes));
  }
  const float log_sum = largest + float(std::log(sum));
  const float loss = log_sum - to_float(logits[target]) + z * log_sum * log_sum;
  const float by = float((1.0 + 2.0 * double(z) * double(log_sum)) / sum);
  const float at_target = scratch[target] * by - 1.0f;
  for (int64_t i = 0; i < size; ++i) logits[i] = rounded(scratch[i] * by);
  logits[target] = rounded(at_target);
  return loss;
}

}  // namespace

namespace xv {
const TrainingKernels XV_TRAINING = {add, accumulate, norm, norm_grad, silu_mul_grad,
                                     rotate, softmax, softmax_grad, cross_entropy};
}  // namespace xv
