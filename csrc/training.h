// The steps of training between the matrix products, forward and backward, for bfloat16 activations and a residual
// stream in float32 or bfloat16: in float32 inside, each tensor read and written once.
#pragma once

#include "kernels.h"

namespace xv {

struct TrainingKernels {
  // y = x + delta
  void (*add)(const float* x, const uint16_t* delta, float* y, int64_t count);

  // total += value
  void (*accumulate)(float* total, const uint16_t* value, int64_t count);

  // sum = x + delta, y = its root-mean-square norm times weight, scale = 1 / rms of each row. Without a delta
  // (null) the sum is x and is not written. x and the sum are of `type`.
  void (*norm)(const void* x, Type type, const uint16_t* delta, const float* weight, void* sum, uint16_t* y,
               float* scale, int64_t rows, int size, float eps);

  // From dy and the gradient dsum that reaches the sum by other ways (null: none): dx, the same in bfloat16
  // (null: not wanted), and added to dweight that of these rows. dsum, sum and dx are of `type`.
  void (*norm_grad)(const uint16_t* dy, const void* dsum, const void* sum, Type type, const float* weight,
                    const float* scale, void* dx, uint16_t* ddelta, float* dweight, int64_t rows, int size);

  // Gradients of silu(gate) * up.
  void (*silu_mul_grad)(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate,
                        uint16_t* dup, int64_t count);

  // One head of one token, turned by cos and sin [head_dim] (null: copied), or back.
  void (*turn)(const uint16_t* x, const float* cos, const float* sin, uint16_t* y, int head_dim, bool back);

  // One query's scores: keys first..last count. In place scores become probabilities, zero outside, of
  // softmax(scale * scores); returns the log of the sum of the exponentials. `spare` holds `keys` values.
  float (*softmax)(uint16_t* scores, int keys, int first, int last, float scale, float* spare);

  // From scores and the log-sum, and dp, the gradient of the probabilities: in place the probabilities and the
  // gradient of the scores.
  void (*softmax_grad)(uint16_t* scores, uint16_t* dp, int keys, int first, int last, float scale, float log_sum,
                       float* spare);

  // One token's logits become their gradient; returns its loss, with z * log_sum^2.
  float (*cross_entropy)(uint16_t* logits, int64_t size, int64_t target, float z, float* spare);
};

// Attention of one head: rows of `length` tokens, bfloat16 [length, head_dim]; starts [length]: the first key that a
// query sees; log_sums [length] of exponentials. Both want memory aligned to 64 bytes.
struct TrainingAttention {
  void (*forward)(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* starts, uint16_t* out,
                  float* log_sums, int length, float scale, void* memory);
  void (*backward)(const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* out,
                   const float* log_sums, const int32_t* starts, uint16_t* dq, uint16_t* dk, uint16_t* dv, int length,
                   float scale, void* memory);
  int64_t (*forward_bytes)(int length);
  int64_t (*backward_bytes)(int length);
};

}  // namespace xv
