// Training (xverse_kernels.h): divides the work among threads.
#include <cmath>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"
#include "xverse_kernels.h"

namespace xv {
namespace {

constexpr int64_t kPart = 8192;  // values of one piece of work
constexpr int64_t kRows = 64;    // rows that share a partial sum of the weight's gradient

const TrainingKernels& table() { return *instruction_set->training; }

// Scratch memory of the calling thread, kept for its next call.
float* scratch(int64_t size) {
  thread_local std::vector<float> memory;
  if (int64_t(memory.size()) < size) memory.resize(size_t(size));
  return memory.data();
}

// The same, aligned to 64 bytes.
void* aligned_scratch(int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(scratch(bytes / 4 + 16));
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

// The fused kernels for heads of this size; null: none.
const TrainingAttention* attention_for(int64_t head_dim) {
  if (head_dim == 64) return instruction_set->training_attention_64;
  if (head_dim == 128) return instruction_set->training_attention_128;
  return nullptr;
}

// Calls body(first, size) for parts of 0 to count - 1.
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

void xv_train_add(const float* x, const uint16_t* delta, float* y, int64_t count, int threads) {
  by_parts(count, threads, [&](int64_t at, int64_t size) { table().add(x + at, delta + at, y + at, size); });
}

void xv_train_accumulate(float* sum, const uint16_t* value, int64_t count, int threads) {
  by_parts(count, threads, [&](int64_t at, int64_t size) { table().accumulate(sum + at, value + at, size); });
}

void xv_train_norm(const void* x, const uint16_t* delta, const float* weight, void* sum, uint16_t* y, float* scale,
                   int type, int64_t rows, int64_t size, float eps, int threads) {
  const int64_t width = type == kFloat32 ? 4 : 2;
  share(rows, threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * size;
    table().norm(static_cast<const char*>(x) + at * width, Type(type), delta == nullptr ? nullptr : delta + at, weight,
                static_cast<char*>(sum) + at * width, y + at, scale + begin, end - begin, int(size), eps);
  });
}

void xv_train_norm_grad(const uint16_t* dy, const void* dsum, const void* sum, const float* weight,
                        const float* scale, void* dx, uint16_t* ddelta, float* dweight, int type, int64_t rows,
                        int64_t size, int threads) {
  const int64_t width = type == kFloat32 ? 4 : 2;
  share((rows + kRows - 1) / kRows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      const int64_t row = part * kRows, at = row * size, count = rows - row < kRows ? rows - row : kRows;
      const auto* other = static_cast<const char*>(dsum);
      table().norm_grad(dy + at, other == nullptr ? nullptr : other + at * width,
                       static_cast<const char*>(sum) + at * width, Type(type), weight, scale + row,
                       static_cast<char*>(dx) + at * width, ddelta == nullptr ? nullptr : ddelta + at,
                       dweight + part * size, count, int(size));
    }
  });
}

void xv_train_silu_mul_grad(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate,
                            uint16_t* dup, int64_t count, int threads) {
  by_parts(count, threads, [&](int64_t at, int64_t size) {
    table().silu_mul_grad(dy + at, gate + at, up + at, dgate + at, dup + at, size);
  });
}

void xv_train_rotate(const uint16_t* x, const float* cos, const float* sin, uint16_t* y, int64_t batch,
                   int64_t length, int64_t heads, int64_t head_dim, int back, int threads) {
  share(batch * length, threads, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t row = token / length, position = token % length;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t flat = (token * heads + head) * head_dim;
        const int64_t split = ((row * heads + head) * length + position) * head_dim;
        const float* cosines = cos == nullptr ? nullptr : cos + token * head_dim;
        const float* sines = sin == nullptr ? nullptr : sin + token * head_dim;
        table().rotate(x + (back ? split : flat), cosines, sines, y + (back ? flat : split), int(head_dim), back != 0);
      }
    }
  });
}

void xv_train_softmax(uint16_t* scores, const int32_t* starts, float* log_sums, int64_t batch, int64_t heads,
                      int64_t length, int64_t first_query, int64_t count, int64_t first_key, int64_t keys,
                      float scale, int threads) {
  share(batch * heads * count, threads, [&](int64_t begin, int64_t end) {
    float* memory = scratch(keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / count, query = first_query + i % count;
      log_sums[head * length + query] = table().softmax(
          scores + i * keys, int(keys), int(starts[head / heads * length + query] - first_key),
          int(query - first_key), scale, memory);
    }
  });
}

void xv_train_softmax_grad(uint16_t* scores, uint16_t* dp, const int32_t* starts, const float* log_sums,
                           int64_t batch, int64_t heads, int64_t length, int64_t first_query, int64_t count,
                           int64_t first_key, int64_t keys, float scale, int threads) {
  share(batch * heads * count, threads, [&](int64_t begin, int64_t end) {
    float* memory = scratch(keys);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / count, query = first_query + i % count;
      table().softmax_grad(scores + i * keys, dp + i * keys, int(keys),
                          int(starts[head / heads * length + query] - first_key), int(query - first_key), scale,
                          log_sums[head * length + query], memory);
    }
  });
}

int xv_has_train_attention(int64_t head_dim) { return attention_for(head_dim) != nullptr; }

void xv_train_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* starts, uint16_t* out,
                        float* log_sums, int64_t batch, int64_t heads, int64_t length, int64_t head_dim, int threads) {
  const TrainingAttention& kernels = *attention_for(head_dim);
  const float scale = 1.0f / std::sqrt(float(head_dim));
  share(batch * heads, threads, [&](int64_t begin, int64_t end) {
    void* memory = aligned_scratch(kernels.forward_bytes(int(length)));
    for (int64_t head = begin; head < end; ++head) {
      const int64_t at = head * length * head_dim;
      kernels.forward(q + at, k + at, v + at, starts + head / heads * length, out + at, log_sums + head * length,
                      int(length), scale, memory);
    }
  });
}

void xv_train_attention_grad(const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                             const uint16_t* out, const float* log_sums, const int32_t* starts, uint16_t* dq,
                             uint16_t* dk, uint16_t* dv, int64_t batch, int64_t heads, int64_t length,
                             int64_t head_dim, int threads) {
  const TrainingAttention& kernels = *attention_for(head_dim);
  const float scale = 1.0f / std::sqrt(float(head_dim));
  share(batch * heads, threads, [&](int64_t begin, int64_t end) {
    void* memory = aligned_scratch(kernels.backward_bytes(int(length)));
    for (int64_t head = begin; head < end; ++head) {
      const int64_t at = head * length * head_dim;
      kernels.backward(grad + at, q + at, k + at, v + at, out + at, log_sums + head * length,
                       starts + head / heads * length, dq + at, dk + at, dv + at, int(length), scale, memory);
    }
  });
}

void xv_train_cross_entropy(uint16_t* logits, const int64_t* targets, float* losses, int64_t tokens, int64_t size,
                            float z, int threads) {
  share(tokens, threads, [&](int64_t begin, int64_t end) {
    float* memory = scratch(size);
    for (int64_t token = begin; token < end; ++token) {
      uint16_t* row = logits + token * size;
      losses[token] = 0.0f;
      if (targets[token] >= 0)
        losses[token] = table().cross_entropy(row, size, targets[token], z, memory);
      else
        for (int64_t i = 0; i < size; ++i) row[i] = 0;
    }
  });
}

}  // extern "C"
