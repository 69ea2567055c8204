// The table of one instruction set for attention over a paged cache. As in kernels.h, each instruction set is a
// separate translation unit; attention_api.cpp divides the work among threads.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace xv {

constexpr int kPrefillRows = 48; // queries of one tile: the floats of three AVX-512 registers
constexpr int kSumsUnit = 64;    // Part::sums is padded to a multiple of this many floats
constexpr int kKeyGroup = 16;    // positions whose scores are computed together; divides the block size

struct Pages {
  void* data;            // [blocks, heads, block_size, head_dim]
  int64_t block_stride;  // elements from one block to the next; other layers may be stored in between
  float* scales;         // [blocks, heads, block_size] for int8, else null
  int64_t scale_stride;
};

// The cached keys and values of one layer.
struct PagedCache {
  Pages keys, values;
  Type type;
  int heads, block_size, head_dim;

  template <class Stored>
  Stored* row(const Pages& pages, int64_t block, int head, int offset) const {
    return static_cast<Stored*>(pages.data) + block * pages.block_stride +
           (int64_t(head) * block_size + offset) * head_dim;
  }
  float* scale(const Pages& pages, int64_t block, int head, int offset) const {
    if (pages.scales == nullptr) return nullptr;
    return pages.scales + block * pages.scale_stride + int64_t(head) * block_size + offset;
  }
};

// Rows [tokens, heads, head_dim] whose last dimension is contiguous; strides in elements. `group` consecutive heads of a
// token's queries share one key head. They are separate queries of the key heads: query token * group + j has the heads
// j, group + j, 2 * group + j and so on.
struct Rows {
  const void* data;
  Type type;
  int64_t token_stride, head_stride;
  int group = 1;

  const void* at(int64_t query, int key_head) const {
    const int64_t token = query / group, head = key_head * int64_t(group) + query % group;
    return static_cast<const char*>(data) +
           (token * token_stride + head * head_stride) * (type == kFloat32 ? 4 : 2);
  }
};

// Unnormalised softmax of one head over a part of a sequence: a weight is 2^(score * log2(e) - maximum).
struct Part {
  float maximum, total;
  float* sums;  // [head_dim]: the weighted sum of the values, padded to a multiple of kSumsUnit
};

struct AttentionKernels {
  // Decoding: for each key head, `query` (see Rows) sees the positions begin to end - 1; `begin` is the start of a
  // block. A bfloat16 cache takes bfloat16 queries. All heads of a block are processed before the next block, so that
  // memory is read in long runs: head by head, 8 KB at a time, reached less than half of the bandwidth.
  void (*decode)(const PagedCache& cache, const int32_t* blocks, int begin, int end, const Rows& queries,
                 int64_t query, Part* parts);

  // Stores the new keys or values of tokens first to last - 1 at slots[token] (block * block_size + offset).
  void (*append)(const PagedCache& cache, const Pages& pages, const Rows& rows, const int64_t* slots,
                 int64_t first, int64_t last);

  // Prefill: `count` bfloat16 queries (up to kPrefillRows) of query head `head`. That of token first + i sees the
  // positions 0 to start + first + i. out [tokens, heads, head_dim].
  void (*prefill)(const PagedCache& cache, const int32_t* blocks, int head, int start, const Rows& queries,
                  int first, int count, uint16_t* out);
};

extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionAvx512Bf16;

// AttentionKernels::prefill of AVX-512 BF16, defined in attention_prefill.cpp.
void prefill_avx512_bf16(const PagedCache& cache, const int32_t* blocks, int head, int start, const Rows& queries,
                         int first, int count, uint16_t* out);
#endif

}  // namespace xv
