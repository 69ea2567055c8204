// The C interface of training.h that Python calls (xverse/kernels/training.py).
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "training.h"

namespace xv {
extern const TrainingKernels kTrainingPortable;
#if defined(__x86_64__)
extern const TrainingKernels kTrainingAvx2;
extern const TrainingKernels kTrainingAvx512;
extern const TrainingAttention kTrainingAttention64, kTrainingAttention128;
#endif

namespace {

const TrainingKernels* table = &kTrainingPortable;
#if defined(__x86_64__)
bool fused = false;  // attention by kernels of its own
#endif

constexpr int64_t kPart = 8192;   // values of one piece of work
constexpr int64_t kRows = 64;     // rows of one piece, whose gradients of weights are summed apart

// Scratch memory of each thread, kept for its next call.
float* spare(int64_t size) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < size) memory.resize(size_t(size));
  return memory.data();
}

// The same, aligned as vectors want it.
void* aligned_spare(int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(spare(bytes / 4 + 16));
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// The kernels for heads of this size; null: none.
const TrainingAttention* attention_for(int64_t head_dim) {
#if defined(__x86_64__)
  if (fused && head_dim == 64) return &kTrainingAttention64;
  if (fused && head_dim == 128) return &kTrainingAttention128;
#endif
  (void)head_dim;
  return nullptr;
}

// body(first, count) over parts of 0..count.
template <class Body>
void by_parts(int64_t count, int threads, const Body& body) {
  share((count + kPart - 1) / kPart, threads, [&](int64_t begin, int64_t end) {
    body(begin * kPart, (end * kPart < count ? end * kPart : count) - begin * kPart);
  });
}

}  // namespace
}  // namespace xv

using namespace xv;

extern "C" {

// By the name that xv_select has given.
void xv_select_training(const char* name) {
#if defined(__x86_64__)
  table = name[0] == 'p' ? &kTrainingPortable : name[3] == '2' ? &kTrainingAvx2 : &kTrainingAvx512;
  fused = std::strcmp(name, "avx512_bf16") == 0;
#else
  (void)name;
#endif
}

void xv_train_add(const float* x, const uint16_t* delta, float* y, int64_t count, int threads) {
  by_parts(count, threads, [&](int64_t at, int64_t size) { table->add(x + at, delta + at, y + at, size); });
}

void xv_train_accumulate(float* sum, const uint16_t* value, int64_t count, int threads) {
  by_parts(count, threads, [&](int64_t at, int64_t size) { table->accumulate(sum + at, value + at, size); });
}

// x and sum are of `type` (kernels.h).
void xv_train_norm(const void* x, const uint16_t* delta, const float* weight, void* sum, uint16_t* y, float* scale,
                   int type, int64_t rows, int64_t size, float eps, int threads) {
  const int64_t width = type == kFloat32 ? 4 : 2;
  share(rows, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    table->norm(static_cast<const char*>(x) + at * width, Type(type), delta == nullptr ? nullptr : delta + at, weight,
                static_cast<char*>(sum) + at * width, y + at, scale + begin, end - begin, int(size), eps);
  });
}

// dsum, sum and dx are of `type`. dweight [ceil(rows / 64), size] is zero before; its rows are to be added up.
void xv_train_norm_grad(const uint16_t* dy, const void* dsum, const void* sum, const float* weight,
                        const float* scale, void* dx, uint16_t* ddelta, float* dweight, int type, int64_t rows,
                        int64_t size, int threads) {
  const int64_t width = type == kFloat32 ? 4 : 2;
  share((rows + kRows - 1) / kRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part * kRows, at = row * size, count = rows - row < kRows ? rows - row : kRows;
      const auto* other = static_cast<const char*>(dsum);
      table->norm_grad(dy + at, other == nullptr ? nullptr : other + at * width,
                       static_cast<const char*>(sum) + at * width, Type(type), weight, scale + row,
                       static_cast<char*>(dx) + at * width, ddelta == nullptr ? nullptr : ddelta + at,
                       dweight + part * size, count, int(size));
    }
  });
}

void xv_train_silu_mul_grad(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate,
                            uint16_t* dup, int64_t count, int threads) {
  by_parts(count, threads, [&](int64_t at, int64_t size) {
    table->silu_mul_grad(dy + at, gate + at, up + at, dgate + at, dup + at, size);
  });
}

// x [batch, length, heads, head_dim] to y [batch, heads, length, head_dim], turned by cos and sin [batch, length,
// head_dim] (null: only moved); `back`: from y's layout to x's, turned back.
void xv_train_turn(const uint16_t* x, const float* cos, const float* sin, uint16_t* y, int64_t batch,
                   int64_t length, int64_t heads, int64_t head_dim, int back, int threads) {
  share(batch * length, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = token / length, position = token % length;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t flat = (token * heads + head) * head_dim;
        const int64_t split = ((row * heads + head) * length + position) * head_dim;
        const float* cosines = cos == nullptr ? nullptr : cos + token * head_dim;
        const float* sines = sin == nullptr ? nullptr : sin + token * head_dim;
        table->turn(x + (back ? split : flat), cosines, sines, y + (back ? flat : split), int(head_dim), back != 0);
      }
    }
  });
}

// Scores [batch * heads, count, keys] of queries first_query.. and keys first_key.. of each row of `length` tokens;
// starts [batch, length]: the first key that a query sees. In place; log_sums [batch * heads, length].
void xv_train_softmax(uint16_t* scores, const int32_t* starts, float* log_sums, int64_t batch, int64_t heads,
                      int64_t length, int64_t first_query, int64_t count, int64_t first_key, int64_t keys,
                      float scale, int threads) {
  share(batch * heads * count, threads, [&](int64_t begin, int64_t end) {
    float* memory = spare(keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / count, query = first_query + i % count;
      log_sums[head * length + query] = table->softmax(
          scores + i * keys, int(keys), int(starts[head / heads * length + query] - first_key),
          int(query - first_key), scale, memory);
    }
  });
}

// The same scores and the gradient dp of the probabilities: in place probabilities and gradient of the scores.
void xv_train_softmax_grad(uint16_t* scores, uint16_t* dp, const int32_t* starts, const float* log_sums,
                           int64_t batch, int64_t heads, int64_t length, int64_t first_query, int64_t count,
                           int64_t first_key, int64_t keys, float scale, int threads) {
  share(batch * heads * count, threads, [&](int64_t begin, int64_t end) {
    float* memory = spare(keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / count, query = first_query + i % count;
      table->softmax_grad(scores + i * keys, dp + i * keys, int(keys),
                          int(starts[head / heads * length + query] - first_key), int(query - first_key), scale,
                          log_sums[head * length + query], memory);
    }
  });
}

int xv_has_train_attention(int64_t head_dim) { return attention_for(head_dim) != nullptr; }

// Causal attention inside documents: q, k, v, out [batch, heads, length, head_dim], log_sums [batch, heads, length],
// starts [batch, length]: the first key that a query sees. A head is one piece of work.
void xv_train_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* starts, uint16_t* out,
                        float* log_sums, int64_t batch, int64_t heads, int64_t length, int64_t head_dim, int threads) {
  const TrainingAttention& kernels = *attention_for(head_dim);
  const float scale = 1.0f / std::sqrt(float(head_dim));
  share(batch * heads, threads, [&](int64_t begin, int64_t end) {
    void* memory = aligned_spare(kernels.forward_bytes(int(length)));
    for (int64_t head = begin; head < end; ++head) {
      const int64_t at = head * length * head_dim;
      kernels.forward(q + at, k + at, v + at, starts + head / heads * length, out + at, log_sums + head * length,
                      int(length), scale, memory);
    }
  });
}

// From grad, the gradient of out: those of q, k and v.
void xv_train_attention_grad(const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                             const uint16_t* out, const float* log_sums, const int32_t* starts, uint16_t* dq,
                             uint16_t* dk, uint16_t* dv, int64_t batch, int64_t heads, int64_t length,
                             int64_t head_dim, int threads) {
  const TrainingAttention& kernels = *attention_for(head_dim);
  const float scale = 1.0f / std::sqrt(float(head_dim));
  share(batch * heads, threads, [&](int64_t begin, int64_t end) {
    void* memory = aligned_spare(kernels.backward_bytes(int(length)));
    for (int64_t head = begin; head < end; ++head) {
      const int64_t at = head * length * head_dim;
      kernels.backward(grad + at, q + at, k + at, v + at, out + at, log_sums + head * length,
                       starts + head / heads * length, dq + at, dk + at, dv + at, int(length), scale, memory);
    }
  });
}

// Logits [tokens, size] become their gradients, in place; losses [tokens]. A target below 0 is ignored: 0.
void xv_train_cross_entropy(uint16_t* logits, const int64_t* targets, float* losses, int64_t tokens, int64_t size,
                            float z, int threads) {
  share(tokens, threads, [&](int64_t begin, int64_t end) {
    float* memory = spare(size);
    for (int64_t token = begin; token < end; ++token) {
      uint16_t* row = logits + token * size;
      losses[token] = 0.0f;
      if (targets[token] >= 0)
        losses[token] = table->cross_entropy(row, size, targets[token], z, memory);
      else
        for (int64_t i = 0; i < size; ++i) row[i] = 0;
    }
  });
}

}  // extern "C"
