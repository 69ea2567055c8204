// The C interface of attention over a paged cache (xverse/kernels/paged_attention.py): cuts the work into parts of
// heads and shares them out.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "attention.h"
#include "parallel.h"

namespace xv {
namespace {

const AttentionKernels* attention = &kAttentionPortable;

// Positions of a sequence that one thread takes at a time. A function of the length alone, so that a row's bits
// depend neither on the other rows nor on the number of threads: guesses are verified by them.
inline int64_t part_size(int64_t length, int64_t block_size) {
  constexpr int64_t kSmallest = 64;  // fewer cost more in bookkeeping than an idle core does
  const int64_t size = std::max((std::max<int64_t>(length, 1) + 15) / 16, kSmallest);
  return (size + block_size - 1) / block_size * block_size;
}

// Elements of keys below which waking another thread takes longer than the work.
constexpr int64_t kSmallWork = 1 << 15;

inline void store(const Part& part, int head_dim, Type type, void* out, int64_t at) {
  const float inverse = 1.0f / part.total;
  for (int d = 0; d < head_dim; ++d) {
    const float value = part.sums[d] * inverse;
    if (type == kFloat32)
      static_cast<float*>(out)[at + d] = value;
    else
      static_cast<uint16_t*>(out)[at + d] = to_bfloat16(value);
  }
}

// Parts of one head, `stride` apart, into the first of them.
inline void merge(Part* parts, int64_t count, int64_t stride, int head_dim) {
  if (count == 1) return;
  float maximum = parts[0].maximum;
  for (int64_t i = 1; i < count; ++i) maximum = std::max(maximum, parts[i * stride].maximum);
  float total = 0;
  for (int64_t i = 0; i < count; ++i) {
    Part& part = parts[i * stride];
    // Equal infinities differ by nothing; a NaN is carried by the part's total.
    const float shrink = part.maximum == maximum ? 1.0f : std::exp2(part.maximum - maximum);
    total += part.total * shrink;
    for (int d = 0; d < head_dim; ++d)
      parts[0].sums[d] = part.sums[d] * shrink + (i > 0 ? parts[0].sums[d] : 0.0f);
  }
  parts[0].total = total;
}

}  // namespace
}  // namespace xv

using namespace xv;

extern "C" {

// One layer's keys and values as Python hands them over (xverse/kernels/paged_attention.py has the same fields).
// Types: 0 float32, 1 bfloat16, 2 int8. Strides in elements.
struct Cache {
  void *keys, *values;
  float *key_scales, *value_scales;
  int64_t key_stride, value_stride, key_scale_stride, value_scale_stride;
  int type, heads, block_size, head_dim;

  PagedCache paged() const {
    return {{keys, key_stride, key_scales, key_scale_stride},
            {values, value_stride, value_scales, value_scale_stride},
            Type(type),
            heads,
            block_size,
            head_dim};
  }
};

// The table of the instruction set that xv_select has named.
void xv_select_attention(const char* name) {
  for (const AttentionKernels* table : {
#if defined(__x86_64__)
           &kAttentionAvx512Bf16, &kAttentionAvx512, &kAttentionAvx2,
#endif
           &kAttentionPortable}) {
    if (std::strcmp(name, table->name) == 0) attention = table;
  }
}

// Whether xv_paged_prefill may be called.
int xv_has_prefill() { return attention->prefill != nullptr; }

// Keys and values of `tokens` tokens into their slots; k and v [tokens, heads, head_dim] with strides.
void xv_paged_append(const Cache* cache, const void* k, const void* v, const int64_t* slots, int type,
                     int64_t tokens, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                     int64_t v_head_stride, int threads) {
  const PagedCache paged = cache->paged();
  const Rows new_keys{k, Type(type), k_token_stride, k_head_stride};
  const Rows new_values{v, Type(type), v_token_stride, v_head_stride};
  const bool small = tokens * paged.heads * paged.head_dim < kSmallWork;
  share(tokens, small ? 1 : threads, [&](int64_t begin, int64_t end) {
    attention->append(paged, paged.keys, new_keys, slots, begin, end);
    attention->append(paged, paged.values, new_values, slots, begin, end);
  });
}

// `batch` queries: q [batch, heads, head_dim] with strides, out contiguous, of `type`. table [batch, max_blocks];
// lengths [batch], at least 1 each. Neighbours may be queries of one sequence.
void xv_paged_attention(const Cache* cache, const void* q, const int32_t* table, const int32_t* lengths,
                        void* out, int type, int64_t batch, int64_t max_blocks, int64_t token_stride,
                        int64_t head_stride, int threads) {
  const PagedCache paged = cache->paged();
  const Rows queries{q, Type(type), token_stride, head_stride};
  const int heads = paged.heads, head_dim = paged.head_dim;
  int64_t positions = 0;
  for (int64_t b = 0; b < batch; ++b) positions += lengths[b];
  if (positions * heads * head_dim < kSmallWork) threads = 1;
  std::vector<int64_t> size(static_cast<size_t>(batch)), first(size_t(batch) + 1);  // part of each query
  for (int64_t b = 0; b < batch; ++b) {
    size[b] = part_size(lengths[b], paged.block_size);
    first[b + 1] = first[b] + (std::max(lengths[b], 1) + size[b] - 1) / size[b];
  }
  const int64_t count = first[batch];
  const bool whole = count == batch;
  // Queries whose sequences begin with the same block see the same keys, or many of them: what stands in one
  // place is read for all of them in turn, from the cache of the processor but for the first.
  struct Task {
    int64_t run, from, query;
  };
  std::vector<Task> tasks;
  tasks.reserve(static_cast<size_t>(count));
  bool shared_blocks = false;
  int64_t run = 0;
  for (int64_t b = 0; b < batch; ++b) {
    const bool same = b > 0 && table[b * max_blocks] == table[(b - 1) * max_blocks];
    shared_blocks |= same;
    if (!same) run = b;
    for (int64_t from = 0; from < std::max(lengths[b], 1); from += size[b]) tasks.push_back({run, from, b});
  }
  if (shared_blocks) {
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& one, const Task& other) {
      return one.run != other.run ? one.run < other.run : one.from < other.from;
    });
  }

  const auto make = [&](std::vector<Part>& parts, std::vector<float>& sums, int64_t items) {
    parts.resize(size_t(items * heads));
    const size_t room = size_t(head_dim + kSumsUnit - 1) / kSumsUnit * kSumsUnit;
    sums.resize(parts.size() * room);
    for (size_t i = 0; i < parts.size(); ++i) parts[i].sums = &sums[i * room];
  };
  std::vector<Part> parts;
  std::vector<float> sums;
  if (!whole) make(parts, sums, count);
  std::vector<std::atomic<int64_t>> missing(static_cast<size_t>(batch));
  for (int64_t b = 0; b < batch; ++b) missing[b] = first[b + 1] - first[b];

  share(count, threads, [&](int64_t begin, int64_t end) {
    std::vector<Part> own;
    std::vector<float> own_sums;
    if (whole) make(own, own_sums, 1);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t from = tasks[at].from, b = tasks[at].query;
      const int to = int(std::min<int64_t>(from + size[b], lengths[b]));
      Part* into = whole ? own.data() : &parts[(first[b] + from / size[b]) * heads];
      attention->decode(paged, table + b * max_blocks, int(from), to, queries, b, into);
      // Whoever finishes a query's last part puts them together: no second meeting of the threads.
      if (missing[b].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      Part* results = whole ? own.data() : &parts[first[b] * heads];
      for (int head = 0; head < heads; ++head) {
        merge(results + head, first[b + 1] - first[b], heads, head_dim);
        store(results[head], head_dim, Type(type), out, (b * heads + head) * head_dim);
      }
    }
  });
}

// `tokens` queries of one sequence at the positions start..start + tokens, whose keys and values are in the
// cache already; bfloat16. q [tokens, heads, head_dim] with strides, out contiguous; table [blocks].
void xv_paged_prefill(const Cache* cache, const void* q, const int32_t* table, void* out, int64_t start,
                      int64_t tokens, int64_t token_stride, int64_t head_stride, int threads) {
  const PagedCache paged = cache->paged();
  const Rows queries{q, kBFloat16, token_stride, head_stride};
  const int64_t tiles = (tokens + kPrefillRows - 1) / kPrefillRows;
  // Tiles of one head follow each other, so that its keys and values stay in the second-level cache.
  share(tiles * paged.heads, threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t from = (tiles - 1 - at % tiles) * kPrefillRows;
      const int rows = int(std::min<int64_t>(kPrefillRows, tokens - from));
      attention->prefill(paged, table, int(at / tiles), int(start), queries, int(from), rows,
                         static_cast<uint16_t*>(out));
    }
  });
}

}  // extern "C"
