// The table of one instruction set for training: the steps between the matrix products, forward and backward, with
// bfloat16 activations and a residual stream in float32 or bfloat16. Computed in float32; each tensor is read and
// written once.
#pragma once

#include "kernels.h"

namespace xv {

struct TrainingKernels {
  // y = x + delta; [count]
  void (*add)(const float* x, const uint16_t* delta, float* y, int64_t count);

  // total += value; [count]
  void (*accumulate)(float* total, const uint16_t* value, int64_t count);

  // xv_train_norm for some rows.
  void (*norm)(const void* x, Type type, const uint16_t* delta, const float* weight, void* sum, uint16_t* y,
               float* scale, int64_t rows, int size, float eps);

  // xv_train_norm_grad for some rows, whose part of the weight's gradient is added to dweight [size].
  void (*norm_grad)(const uint16_t* dy, const void* dsum, const void* sum, Type type, const float* weight,
                    const float* scale, void* dx, uint16_t* ddelta, float* dweight, int64_t rows, int size);

  // Gradients of silu(gate) * up; [count].
  void (*silu_mul_grad)(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate,
                        uint16_t* dup, int64_t count);

  // Rotary embedding of one head of one token by cos and sin [head_dim] (null: a copy), or with `back` its inverse.
  void (*rotate)(const uint16_t* x, const float* cos, const float* sin, uint16_t* y, int head_dim, bool back);

  // One query's scores [keys] become probabilities, in place: softmax(scale * scores) over the keys first to last, zero
  // elsewhere. Returns the log of the sum of exponentials. scratch [keys].
  float (*softmax)(uint16_t* scores, int keys, int first, int last, float scale, float* scratch);

  // From one query's scores, its log-sum and dp, the gradient of the probabilities: in place the probabilities and the
  // gradient of the scores.
  void (*softmax_grad)(uint16_t* scores, uint16_t* dp, int keys, int first, int last, float scale, float log_sum,
                       float* scratch);

  // One token's logits [size] become the gradient of its loss, in place. Returns the loss, z * log_sum^2 included.
  float (*cross_entropy)(uint16_t* logits, int64_t size, int64_t target, float z, float* scratch);
};

// Fused attention of one head (xv_train_attention): bfloat16 rows [length, head_dim], starts and log_sums [length].
// `memory`, aligned to 64 bytes, has the size that the functions below give.
struct TrainingAttention {
  void (*forward)(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* starts, uint16_t* out,
                  float* log_sums, int length, float scale, void* memory);
  void (*backward)(const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* out,
                   const float* log_sums, const int32_t* starts, uint16_t* dq, uint16_t* dk, uint16_t* dv, int length,
                   float scale, void* memory);
  int64_t (*forward_bytes)(int length);
  int64_t (*backward_bytes)(int length);
};

extern const TrainingKernels kTrainingPortable;
#if defined(__x86_64__)
extern const TrainingKernels kTrainingAvx2;
extern const TrainingKernels kTrainingAvx512;
extern const TrainingAttention kTrainingAttention64, kTrainingAttention128;  // AVX-512 BF16
#endif

}  // namespace xv
