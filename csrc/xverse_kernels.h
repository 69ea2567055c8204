// The C interface of the CPU kernels: every function that libxverse_kernels.so exports, and every struct and constant
// that crosses it. xverse/kernels/native.py binds all of it with ctypes; tests/kernels/test_abi.py compares the two.
// A file that defines or calls one of these functions includes this header and declares none itself.
//
// Conventions: arrays are contiguous and row-major unless strides are given; strides count elements. bfloat16 values
// are passed as uint16_t. `type` is an XvType. `threads` is the largest number of threads to use.
#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum XvType {
  XV_FLOAT32 = 0,
  XV_BFLOAT16 = 1,
  XV_INT8 = 2,  // cached keys and values only: one float32 scale for each position and head
};

// How a weight is stored: 4 or 8 for integers of so many bits, or XV_TABLE + 2, 3 or 4 for indices of so many bits into a
// table of signed bytes; each group of inputs has a bfloat16 scale (kernels/tiles.py describes the layout).
enum XvFormat {
  XV_TABLE = 16,
};

// ---- setting up ----

// Selects an instruction set by name, or the best one of this processor for "". Returns the name of the one in use, or
// null if the processor or this build does not have the one named. Not while another function runs.
const char* xv_select(const char* name);

// Sets the GOMP_parallel to run threads with; null: the caller's thread alone.
void xv_use_openmp(void* gomp_parallel);

// Requests huge pages for memory that has not been written yet: fewer page faults, and about a tenth more read
// bandwidth later.
void xv_use_huge_pages(void* memory, int64_t size);

// ---- quantised weights ----

// For each of `count` weights y[i] [tokens, outputs[i]] = x [tokens, inputs] times the transpose of the weight in
// tiles[i] (xv_tile). x and y are float32 or bfloat16. x is quantised once for all weights.
void xv_quant_linear(const void* x, const uint8_t* const* tiles, void* const* y, const int64_t* outputs, int count,
                     int type, int64_t tokens, int64_t inputs, int format, int group, int threads);

// Tiles of a weight from its rows: `rows` [outputs, inputs * bits / 8] of unsigned values or indices (to_rows of
// kernels/tiles.py), `scales` bfloat16 [outputs, inputs / group]; `table` has 2^bits entries, null without.
void xv_tile(const uint8_t* rows, const uint16_t* scales, const int8_t* table, uint8_t* tiles, int64_t outputs,
             int64_t inputs, int format, int group, int threads);

// The inverse of xv_tile: weight [outputs, inputs], float32 or bfloat16, each value times its scale.
void xv_dequantize(const uint8_t* tiles, void* weight, int type, int64_t outputs, int64_t inputs, int format, int group,
                   int threads);

// Rounds `weight` [rows, inputs] to integers q [rows, inputs] and bfloat16 scales [rows, inputs / group]. `importance`
// [inputs] weights each input's squared error. `divisors` [count]: the scales to try are the largest magnitude of a
// group divided by each of them. With `table`, 2^bits entries in ascending order, weights are rounded to its entries
// and q are their indices less 2^(bits-1); null without.
void xv_round(const float* weight, const float* importance, int8_t* q, uint16_t* scales, int64_t rows, int64_t inputs,
              int bits, const int8_t* table, int group, const float* divisors, int count,
              int threads);

// Rounds `count` columns of a weight in order; the error of each is moved to the columns after it. weight, q and errors
// [rows, ...] point to the first column of the block, their rows are `stride` elements apart. shift [rows, count]: what
// the columns take of errors before the block; overwritten. feedback [count, count], scales [rows, groups], group_of
// [count]: the scale of each column. errors: of the weight itself.
void xv_round_columns(const float* weight, float* shift, const float* feedback, const float* scales,
                      const int32_t* group_of, int8_t* q, float* errors, int64_t rows, int64_t stride, int64_t groups,
                      int count, int bits, const int8_t* table, int threads);

// ---- the other layers ----

// y [tokens, outputs] = x [tokens, inputs] times the transpose of w [outputs, inputs]; all of `type`.
void xv_linear(const void* x, const void* w, void* y, int type, int64_t tokens, int64_t outputs, int64_t inputs,
               int threads);

// What an adapter (LoRA) adds to a linear layer: a [rank, inputs] and b [rank, outputs], the transpose of peft's B times
// its scale, both of the activations' type. a is null if the adapter does not change the layer.
struct XvLora {
  const void* a;
  const void* b;
  int64_t rank;
};

// Adds to the outputs y[j] [tokens, outputs[j]] of `count` layers of one input x [tokens, inputs] what adapters[i][j]
// gives for the tokens bounds[i] to bounds[i + 1] - 1; bounds [adapter_count + 1].
void xv_lora(const void* x, void* const* y, const int64_t* outputs, int count, const struct XvLora* const* adapters,
             int adapter_count, const int64_t* bounds, int type, int64_t inputs, int threads);

// y [rows, size] = RMSNorm of x [rows, size], times weight [size] of `weight_type`.
void xv_rms_norm(const void* x, const void* weight, void* y, int type, int weight_type, int64_t rows, int64_t size,
                 float eps, int threads);

// y = silu(gate) * up; [count] each.
void xv_silu_mul(const void* gate, const void* up, void* y, int type, int64_t count, int threads);

// Rotary embedding of q [tokens, heads, head_dim] and k [tokens, key_heads, head_dim], in place; tables cos and sin
// [tokens, head_dim].
void xv_rotate(void* q, void* k, const void* cos, const void* sin, int type, int64_t tokens, int heads, int key_heads,
               int head_dim, int threads);

// ---- attention over a paged cache ----

// Keys and values of one layer, [blocks, heads, block_size, head_dim] of `type`; with XV_INT8 their scales [blocks,
// heads, block_size], else null. A stride is the distance from one block to the next; a block is contiguous.
struct XvCache {
  void* keys;
  void* values;
  float* key_scales;
  float* value_scales;
  int64_t key_stride;
  int64_t value_stride;
  int64_t key_scale_stride;
  int64_t value_scale_stride;
  int type;
  int heads;
  int block_size;
  int head_dim;
};

// Stores k and v [tokens, heads, head_dim] at slots [tokens]: block * block_size + offset.
void xv_paged_append(const struct XvCache* cache, const void* k, const void* v, const int64_t* slots, int type,
                     int64_t tokens, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                     int64_t v_head_stride, int threads);

// Attention of `batch` independent queries: q [batch, heads * group, head_dim] with strides, out [batch, heads * group,
// head_dim], both of `type`; `group` consecutive heads share a head of the cache. Query b sees the first lengths[b] >= 1
// positions of the blocks in row b of table [batch, max_blocks]. Consecutive rows whose sequences begin with the same
// block are computed together.
void xv_paged_attention(const struct XvCache* cache, const void* q, const int32_t* table, const int32_t* lengths,
                        void* out, int type, int64_t batch, int64_t max_blocks, int64_t token_stride,
                        int64_t head_stride, int group, int threads);

// Attention of `tokens` consecutive queries of one sequence, the first at position `start`: query i sees the positions
// 0 to start + i, whose keys and values are in the cache already. q bfloat16 [tokens, heads * group, head_dim] with
// strides, out bfloat16 [tokens, heads * group, head_dim]; table [blocks].
void xv_paged_prefill(const struct XvCache* cache, const void* q, const int32_t* table, void* out, int64_t start,
                      int64_t tokens, int64_t token_stride, int64_t head_stride, int group, int threads);

// ---- all layers in one call ----

// A linear layer: tiles of a format, or with `format` 0 rows [outputs, inputs] of the activations' type.
struct XvWeight {
  const void* data;
  int64_t outputs;
  int format;
  int group;
};

struct XvLayer {
  struct XvWeight q;
  struct XvWeight k;
  struct XvWeight v;
  struct XvWeight o;
  struct XvWeight gate;
  struct XvWeight up;
  struct XvWeight down;
  const void* attention_norm;
  const void* mlp_norm;
  const struct XvCache* cache;
};

// Runs the residual stream x [tokens, hidden] through `count` layers, in place. Each token is an independent query:
// cos and sin [tokens, head_dim], slots and lengths [tokens], table [tokens, max_blocks] as for xv_paged_append and
// xv_paged_attention. There are `heads` query heads; the cache has the number of key heads and head_dim. `buffer` has
// room for tokens * (2 * hidden + 2 * (heads + key heads) * head_dim + 3 * intermediate) values of `type`. adapters[i]
// [count, 7] in the order of XvLayer's weights belongs to the tokens bounds[i] to bounds[i + 1] - 1, as in xv_lora.
void xv_fused_step(const struct XvLayer* layers, int count, void* x, const void* cos, const void* sin,
                   const int64_t* slots, const int32_t* table, const int32_t* lengths, void* buffer, int type,
                   int norm_type, int64_t tokens, int64_t hidden, int64_t intermediate, int heads, int64_t max_blocks,
                   float eps, const struct XvLora* const* adapters, int adapter_count, const int64_t* bounds,
                   int threads);

// ---- training in bfloat16 ----

// y = x + delta; [count] each.
void xv_train_add(const float* x, const uint16_t* delta, float* y, int64_t count, int threads);

// total += value; [count] each.
void xv_train_accumulate(float* total, const uint16_t* value, int64_t count, int threads);

// sum = x + delta, y = RMSNorm of the sum times weight [size], scale [rows] = 1 / RMS of the sum. x, delta, sum and y
// are [rows, size]; x and sum are of `type`. Without a delta (null) the sum is x, and `sum` is not written.
void xv_train_norm(const void* x, const uint16_t* delta, const float* weight, void* sum, uint16_t* y, float* scale,
                   int type, int64_t rows, int64_t size, float eps, int threads);

// The gradient dx [rows, size] of xv_train_norm's input, from dy and from dsum, the gradient of the output `sum` (null:
// zero). ddelta: the same in bfloat16 (null: not wanted). dweight [ceil(rows / 64), size], zero before the
// call: the weight's gradient, summed over 64 rows each. dsum, sum and dx are of `type`.
void xv_train_norm_grad(const uint16_t* dy, const void* dsum, const void* sum, const float* weight, const float* scale,
                        void* dx, uint16_t* ddelta, float* dweight, int type, int64_t rows, int64_t size, int threads);

// Gradients of y = silu(gate) * up; [count] each.
void xv_train_silu_mul_grad(const uint16_t* dy, const uint16_t* gate, const uint16_t* up, uint16_t* dgate,
                            uint16_t* dup, int64_t count, int threads);

// x [batch, length, heads, head_dim] to y [batch, heads, length, head_dim] with rotary embedding by cos and sin [batch,
// length, head_dim] (null: transposed only). With `back` the inverse: from y's layout to x's, rotated back.
void xv_train_rotate(const uint16_t* x, const float* cos, const float* sin, uint16_t* y, int64_t batch, int64_t length,
                     int64_t heads, int64_t head_dim, int back, int threads);

// In place, the softmax of scale * scores over the keys from starts[query] to the query itself, zero elsewhere. scores
// [batch * heads, count, keys] of the queries from first_query and the keys from first_key; starts [batch, length];
// log_sums [batch * heads, length]: the log of each sum of exponentials.
void xv_train_softmax(uint16_t* scores, const int32_t* starts, float* log_sums, int64_t batch, int64_t heads,
                      int64_t length, int64_t first_query, int64_t count, int64_t first_key, int64_t keys, float scale,
                      int threads);

// From the same scores and dp, the gradient of the probabilities: in place the probabilities and the gradient of the
// scores.
void xv_train_softmax_grad(uint16_t* scores, uint16_t* dp, const int32_t* starts, const float* log_sums, int64_t batch,
                           int64_t heads, int64_t length, int64_t first_query, int64_t count, int64_t first_key,
                           int64_t keys, float scale, int threads);

// Whether the instruction set in use has xv_train_attention for heads of this size.
int xv_has_train_attention(int64_t head_dim);

// Causal attention within documents: q, k, v, out [batch, heads, length, head_dim]; starts [batch, length]: the first
// key that each query sees; log_sums [batch, heads, length] of exponentials.
void xv_train_attention(const uint16_t* q, const uint16_t* k, const uint16_t* v, const int32_t* starts, uint16_t* out,
                        float* log_sums, int64_t batch, int64_t heads, int64_t length, int64_t head_dim, int threads);

// Gradients dq, dk and dv from `grad`, the gradient of out.
void xv_train_attention_grad(const uint16_t* grad, const uint16_t* q, const uint16_t* k, const uint16_t* v,
                             const uint16_t* out, const float* log_sums, const int32_t* starts, uint16_t* dq,
                             uint16_t* dk, uint16_t* dv, int64_t batch, int64_t heads, int64_t length,
                             int64_t head_dim, int threads);

// In place, logits [tokens, size] become the gradient of their loss, cross-entropy + z * log_sum^2; losses [tokens]. A
// target below 0 is ignored: loss and gradient are 0.
void xv_train_cross_entropy(uint16_t* logits, const int64_t* targets, float* losses, int64_t tokens, int64_t size,
                            float z, int threads);

#ifdef __cplusplus
}
#endif
