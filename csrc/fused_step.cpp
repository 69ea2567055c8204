// All layers of a model for a few tokens in one call (xverse_kernels.h). There is little work between the products of
// one token; starting each step from Python, whose data the weights have evicted from the caches, took an eighth of the
// time. The steps are the functions of the other files, in the same order and with the same rounding.
#include <initializer_list>
#include <vector>

#include "kernels.h"
#include "xverse_kernels.h"

using namespace xv;

namespace {

// The adapters of a step, as in xv_fused_step.
struct Adapters {
  const XvLora* const* all;
  int count;
  const int64_t* bounds;
};

// Several products of one input; quantised weights of the same format in one call. `first`: the number of the first
// weight among those of all layers.
void project(const void* x, std::initializer_list<const XvWeight*> weights, std::initializer_list<void*> outputs,
             int type, int64_t tokens, int64_t inputs, const Adapters& adapters, int64_t first, int threads) {
  const XvWeight* const* weight = weights.begin();
  void* const* y = outputs.begin();
  const int count = int(weights.size());
  int64_t sizes[3];
  bool same_format = true;
  for (int i = 0; i < count; ++i) {
    same_format = same_format && weight[i]->format == weight[0]->format && weight[i]->group == weight[0]->group;
    sizes[i] = weight[i]->outputs;
  }
  const int together = same_format && weight[0]->format != 0 ? count : 1;
  for (int i = 0; i < count; i += together) {
    if (weight[i]->format == 0) {
      xv_linear(x, weight[i]->data, y[i], type, tokens, sizes[i], inputs, threads);
      continue;
    }
    const uint8_t* tiles[3];
    for (int j = 0; j < together; ++j) tiles[j] = static_cast<const uint8_t*>(weight[i + j]->data);
    xv_quant_linear(x, tiles, y + i, sizes + i, together, type, tokens, inputs, weight[i]->format, weight[i]->group,
                    threads);
  }
  if (adapters.count == 0) return;
  std::vector<const XvLora*> own(adapters.all, adapters.all + adapters.count);
  for (const XvLora*& adapter : own) adapter += first;
  xv_lora(x, y, sizes, count, own.data(), adapters.count, adapters.bounds, type, inputs, threads);
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
                   int64_t hidden, int64_t intermediate, int heads, int64_t max_blocks, float eps,
                   const XvLora* const* adapters, int adapter_count, const int64_t* bounds, int threads) {
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
  const Adapters own{adapters, adapter_count, bounds};
  for (int64_t i = 0; i < count; ++i) {
    const XvLayer& layer = layers[i];
    xv_rms_norm(x, layer.attention_norm, normed, type, norm_type, tokens, hidden, eps, threads);
    project(normed, {&layer.q, &layer.k, &layer.v}, {q, k, v}, type, tokens, hidden, own, 7 * i, threads);
    xv_rotate(q, k, cos, sin, type, tokens, heads, key_heads, int(head_dim), threads);
    xv_paged_append(layer.cache, k, v, slots, type, tokens, key_size, head_dim, key_size, head_dim, threads);
    xv_paged_attention(layer.cache, q, table, lengths, mixed, type, tokens, max_blocks, query_size, head_dim, group,
                       threads);
    project(mixed, {&layer.o}, {out}, type, tokens, query_size, own, 7 * i + 3, threads);
    add(x, out, type, tokens * hidden);
    xv_rms_norm(x, layer.mlp_norm, normed, type, norm_type, tokens, hidden, eps, threads);
    project(normed, {&layer.gate, &layer.up}, {gate, up}, type, tokens, hidden, own, 7 * i + 4, threads);
    xv_silu_mul(gate, up, active, type, tokens * intermediate, threads);
    project(active, {&layer.down}, {out}, type, tokens, intermediate, own, 7 * i + 6, threads);
    add(x, out, type, tokens * hidden);
  }
}

}  // extern "C"
