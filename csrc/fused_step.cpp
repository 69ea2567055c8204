// All layers of a model for a few tokens in one call (xverse_kernels.h). There is little work between the products of
// one token; starting each step from Python, whose data the weights have evicted from the caches, took an eighth of the
// time. The steps are the functions of the other files, in the same order and with the same rounding.
#include <initializer_list>

#include "kernels.h"
#include "xverse_kernels.h"

using namespace xv;

namespace {

// Several products of one input; quantised weights of the same format in one call.
void project(const void* x, std::initializer_list<const XvWeight*> weights, std::initializer_list<void*> outputs,
             int type, int64_t tokens, int64_t inputs, int threads) {
  const XvWeight* const* weight = weights.begin();
  void* const* y = outputs.begin();
  const int count = int(weights.size());
  bool same_format = true;
  for (int i = 0; i < count; ++i)
    same_format = same_format && weight[i]->format == weight[0]->format && weight[i]->group == weight[0]->group;
  const int together = same_format && weight[0]->format != 0 ? count : 1;
  for (int i = 0; i < count; i += together) {
    if (weight[i]->format == 0) {
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
    xv_quant_linear(x, tiles, y + i, sizes, together, type, tokens, inputs, weight[i]->format, weight[i]->group,
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

void xv_fused_step(const XvLayer* layers, int count, void* x, const void* cos, const void* sin, const int64_t* slots,
                   const int32_t* table, const int32_t* lengths, void* buffer, int type, int norm_type, int64_t tokens,
                   int64_t hidden, int64_t intermediate, int heads, int64_t max_blocks, float eps, int threads) {
  const int64_t width = size_of(type), head_dim = layers[0].cache->head_dim;
  const int key_heads = layers[0].cache->heads, group = heads / key_heads;
  const int64_t query_size = heads * head_dim, key_size = key_heads * head_dim;
  auto* free_space = static_cast<char*>(buffer);
  const auto take = [&](int64_t values) {
    void* array = free_space;
    free_space += tokens * values * width;
    return array;
  };
  void *normed = take(hidden), *q = take(query_size), *k = take(key_size), *v = take(key_size);
  void* mixed = take(query_size);
  void *out = take(hidden), *gate = take(intermediate), *up = take(intermediate), *active = take(intermediate);
  for (int i = 0; i < count; ++i) {
    const XvLayer& layer = layers[i];
    xv_rms_norm(x, layer.attention_norm, normed, type, norm_type, tokens, hidden, eps, threads);
    project(normed, {&layer.q, &layer.k, &layer.v}, {q, k, v}, type, tokens, hidden, threads);
    xv_rotate(q, k, cos, sin, type, tokens, heads, key_heads, int(head_dim), threads);
    xv_paged_append(layer.cache, k, v, slots, type, tokens, key_size, head_dim, key_size, head_dim, threads);
    xv_paged_attention(layer.cache, q, table, lengths, mixed, type, tokens, max_blocks, query_size, head_dim, group,
                       threads);
    project(mixed, {&layer.o}, {out}, type, tokens, query_size, threads);
    add(x, out, type, tokens * hidden);
    xv_rms_norm(x, layer.mlp_norm, normed, type, norm_type, tokens, hidden, eps, threads);
    project(normed, {&layer.gate, &layer.up}, {gate, up}, type, tokens, hidden, threads);
    xv_silu_mul(gate, up, active, type, tokens * intermediate, threads);
    project(active, {&layer.down}, {out}, type, tokens, intermediate, threads);
    add(x, out, type, tokens * hidden);
  }
}

}  // extern "C"
