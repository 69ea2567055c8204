// All layers of a model for a few tokens in one call (xverse/kernels/fused_step.py). Between the products of one token
// lies little work, and starting each piece of it from Python, whose own memory the weights have driven out of
// the caches, took an eighth of the time. The steps are those of the other files, in the same order and with
// the same rounding.
#include <cstdint>
#include <initializer_list>

#include "kernels.h"
#include "parallel.h"

struct Cache;  // attention_api.cpp

extern "C" {
void xv_quant_linear(const void* x, const uint8_t* const* tiles, void* const* y, const int64_t* outputs, int count,
                     int type, int64_t tokens, int64_t inputs, int bits, int group, int threads);
void xv_linear_bf16(const uint16_t* x, const uint16_t* w, uint16_t* y, int64_t tokens, int64_t outputs,
                    int64_t inputs, int threads);
void xv_rms_norm(const void* x, const void* weight, void* y, int type, int weight_type, int64_t rows, int64_t size,
                 float eps, int threads);
void xv_silu_mul(const void* gate, const void* up, void* y, int type, int64_t count, int threads);
void xv_rotate(void* q, void* k, const void* cos, const void* sin, int type, int64_t tokens, int heads,
               int head_dim, int threads);
void xv_paged_append(const Cache* cache, const void* k, const void* v, const int64_t* slots, int type,
                     int64_t tokens, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                     int64_t v_head_stride, int threads);
void xv_paged_attention(const Cache* cache, const void* q, const int32_t* table, const int32_t* lengths,
                        void* out, int type, int64_t batch, int64_t max_blocks, int64_t token_stride,
                        int64_t head_stride, int threads);
}

using namespace xv;

namespace {

// A linear layer: tiles of 4 or 8 bits, or bfloat16 rows (16).
struct Weight {
  const void* data;
  int64_t outputs;
  int bits, group;
};

// As Python hands it over (xverse/kernels/fused_step.py has the same fields).
struct Layer {
  Weight q, k, v, o, gate, up, down;
  const void *attention_norm, *mlp_norm;
  const Cache* cache;
};

// Several products of one input; quantised ones of one kind together.
void project(const void* x, std::initializer_list<const Weight*> weights, std::initializer_list<void*> outputs,
             int type, int64_t tokens, int64_t inputs, int threads) {
  const Weight* const* weight = weights.begin();
  void* const* y = outputs.begin();
  const int count = int(weights.size());
  bool alike = true;
  for (int i = 0; i < count; ++i)
    alike = alike && weight[i]->bits == weight[0]->bits && weight[i]->group == weight[0]->group;
  const int together = alike && weight[0]->bits != 16 ? count : 1;
  for (int i = 0; i < count; i += together) {
    if (weight[i]->bits == 16) {
      xv_linear_bf16(static_cast<const uint16_t*>(x), static_cast<const uint16_t*>(weight[i]->data),
                     static_cast<uint16_t*>(y[i]), tokens, weight[i]->outputs, inputs, threads);
      continue;
    }
    const uint8_t* tiles[3];
    int64_t sizes[3];
    for (int j = 0; j < together; ++j) {
      tiles[j] = static_cast<const uint8_t*>(weight[i + j]->data);
      sizes[j] = weight[i + j]->outputs;
    }
    xv_quant_linear(x, tiles, y + i, sizes, together, type, tokens, inputs, weight[i]->bits, weight[i]->group,
                    threads);
  }
}

// x += y
void add(void* x, const void* y, int type, int64_t count) {
  if (type == kFloat32) {
    auto* to = static_cast<float*>(x);
    const auto* from = static_cast<const float*>(y);
    for (int64_t i = 0; i < count; ++i) to[i] += from[i];
  } else {
    auto* to = static_cast<uint16_t*>(x);
    const auto* from = static_cast<const uint16_t*>(y);
    for (int64_t i = 0; i < count; ++i) to[i] = to_bfloat16(to_float(to[i]) + to_float(from[i]));
  }
}

}  // namespace

extern "C" {

// The residual stream x [tokens, hidden] through `count` layers, in place. One row of cos and sin [tokens, head_dim],
// of slots and lengths [tokens] and of table [tokens, max_blocks] for each token. `buffer` holds
// 6 * hidden + 3 * intermediate values for each token.
void xv_decoder(const Layer* layers, int count, void* x, const void* cos, const void* sin, const int64_t* slots,
                const int32_t* table, const int32_t* lengths, void* buffer, int type, int norm_type,
                int64_t tokens, int64_t hidden, int64_t intermediate, int heads, int64_t max_blocks, float eps,
                int threads) {
  const int64_t width = type == kFloat32 ? 4 : 2, head_dim = hidden / heads;
  auto* room = static_cast<char*>(buffer);
  const auto take = [&](int64_t values) {
    void* found = room;
    room += tokens * values * width;
    return found;
  };
  void *normed = take(hidden), *q = take(hidden), *k = take(hidden), *v = take(hidden), *mixed = take(hidden);
  void *out = take(hidden), *gate = take(intermediate), *up = take(intermediate), *active = take(intermediate);
  for (int i = 0; i < count; ++i) {
    const Layer& layer = layers[i];
    xv_rms_norm(x, layer.attention_norm, normed, type, norm_type, tokens, hidden, eps, threads);
    project(normed, {&layer.q, &layer.k, &layer.v}, {q, k, v}, type, tokens, hidden, threads);
    xv_rotate(q, k, cos, sin, type, tokens, heads, int(head_dim), threads);
    xv_paged_append(layer.cache, k, v, slots, type, tokens, hidden, head_dim, hidden, head_dim, threads);
    xv_paged_attention(layer.cache, q, table, lengths, mixed, type, tokens, max_blocks, hidden, head_dim, threads);
    project(mixed, {&layer.o}, {out}, type, tokens, hidden, threads);
    add(x, out, type, tokens * hidden);
    xv_rms_norm(x, layer.mlp_norm, normed, type, norm_type, tokens, hidden, eps, threads);
    project(normed, {&layer.gate, &layer.up}, {gate, up}, type, tokens, hidden, threads);
    xv_silu_mul(gate, up, active, type, tokens * intermediate, threads);
    project(active, {&layer.down}, {out}, type, tokens, intermediate, threads);
    add(x, out, type, tokens * hidden);
  }
}

}  // extern "C"
