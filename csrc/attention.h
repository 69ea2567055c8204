// Attention over a paged cache: what one instruction set offers. As in kernels.h, each instruction set is a
// translation unit of its own; `attention_api.cpp` chooses a table at run time and shares the work out.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace xv {

constexpr Type kInt8 = Type(2);  // of cached values only: one float scale for each position and head
constexpr int kPrefillRows = 48; // queries of one tile: three AVX-512 registers of floats
constexpr int kSumsUnit = 64;
constexpr int kKeyGroup = 16;    // positions whose scores are made together; divides the block size

struct Pages {
  void* data;            // [blocks, heads, block_size, head_dim]
  int64_t block_stride;  // elements from one block to the next: other layers may lie between them
  float* scales;         // [blocks, heads, block_size] of int8, else null
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

// Rows [tokens, heads, head_dim] whose last dimension is contiguous; strides in elements.
struct Rows {
  const void* data;
  Type type;
  int64_t token_stride, head_stride;

  const void* at(int64_t token, int head) const {
    return static_cast<const char*>(data) +
           (token * token_stride + head * head_stride) * (type == kFloat32 ? 4 : 2);
  }
};

// Softmax of one head over a part of a sequence, not divided yet: a weight is 2^(score * log2(e) - maximum).
struct Part {
  float maximum, total;
  float* sums;  // [head_dim], with room for a multiple of kSumsUnit
};

struct AttentionKernels {
  const char* name;

  // One query, that of `token`, of each head sees the positions begin..end; `begin` starts a block. Queries
  // of a bfloat16 cache are bfloat16. All heads of a block go before the next block: memory is then read in
  // long runs. Head by head, 8 KB at a time, it gave less than half of its bandwidth.
  void (*decode)(const PagedCache& cache, const int32_t* blocks, int begin, int end, const Rows& queries,
                 int64_t token, Part* parts);

  // Rows first..last of new keys or values into the places `slots` (block * block_size + offset).
  void (*append)(const PagedCache& cache, const Pages& pages, const Rows& rows, const int64_t* slots,
                 int64_t first, int64_t last);

  // `count` queries (up to kPrefillRows) of one head, bfloat16: the query of token first + i sees the
  // positions 0..start + first + i. Out [tokens, heads, head_dim], contiguous. Null: PyTorch's attention
  // is used.
  void (*prefill)(const PagedCache& cache, const int32_t* blocks, int head, int start, const Rows& queries,
                  int first, int count, uint16_t* out);
};

extern const AttentionKernels kAttentionPortable;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
extern const AttentionKernels kAttentionAvx512Bf16;
#endif

}  // namespace xv
