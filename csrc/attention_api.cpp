// Attention over a paged cache (xverse_kernels.h): divides sequences into parts, and those among threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"
#include "xverse_kernels.h"

namespace xv {
namespace {

PagedCache paged_cache(const XvCache& cache) {
  return {{cache.keys, cache.key_stride, cache.key_scales, cache.key_scale_stride},
          {cache.values, cache.value_stride, cache.value_scales, cache.value_scale_stride},
          Type(cache.type),
          cache.heads,
          cache.block_size,
          cache.head_dim};
}

// Positions of a sequence that one thread takes at a time. Depends on the length alone, so that a row's bits depend
// neither on the other rows nor on the number of threads; speculative decoding relies on it.
inline int64_t part_size(int64_t length, int64_t block_size) {
  constexpr int64_t kSmallest = 64;  // fewer cost more in bookkeeping than they gain from another core
  const int64_t size = std::max((std::max<int64_t>(length, 1) + 15) / 16, kSmallest);
  return (size + block_size - 1) / block_size * block_size;
}

// With fewer elements of keys, waking threads takes longer than the work.
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

// Merges the parts of one head, `stride` apart, into the first.
inline void merge(Part* parts, int64_t count, int64_t stride, int head_dim) {
  if (count == 1) return;
  float maximum = parts[0].maximum;
  for (int64_t i = 1; i < count; ++i) maximum = std::max(maximum, parts[i * stride].maximum);
  float total = 0;
  for (int64_t i = 0; i < count; ++i) {
    Part& part = parts[i * stride];
    // The difference of equal infinities would be NaN. A NaN in a part is kept in its total.
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

void xv_paged_append(const XvCache* cache, const void* k, const void* v, const int64_t* slots, int type,
                     int64_t tokens, int64_t k_token_stride, int64_t k_head_stride, int64_t v_token_stride,
                     int64_t v_head_stride, int threads) {
  const PagedCache paged = paged_cache(*cache);
  const Rows new_keys{k, Type(type), k_token_stride, k_head_stride};
  const Rows new_values{v, Type(type), v_token_stride, v_head_stride};
  const bool small = tokens * paged.heads * paged.head_dim < kSmallWork;
  share(tokens, small ? 1 : threads, [&](int64_t begin, int64_t end) {
    instruction_set->attention->append(paged, paged.keys, new_keys, slots, begin, end);
    instruction_set->attention->append(paged, paged.values, new_values, slots, begin, end);
  });
}

void xv_paged_attention(const XvCache* cache, const void* q, const int32_t* table, const int32_t* lengths,
                        void* out, int type, int64_t batch, int64_t max_blocks, int64_t token_stride,
                        int64_t head_stride, int group, int threads) {
  const PagedCache paged = paged_cache(*cache);
  const Rows queries{q, Type(type), token_stride, head_stride, group};
  const int heads = paged.heads, head_dim = paged.head_dim;
  int64_t positions = 0;
  for (int64_t b = 0; b < batch; ++b) positions += lengths[b];
  if (positions * heads * head_dim * group < kSmallWork) threads = 1;
  // Of each query (see Rows): the positions in a part, and the number of its first part.
  const int64_t many = batch * group;
  std::vector<int64_t> size(static_cast<size_t>(many)), first(size_t(many) + 1);
  for (int64_t i = 0; i < many; ++i) {
    const int32_t length = lengths[i / group];
    size[i] = part_size(length, paged.block_size);
    first[i + 1] = first[i] + (std::max(length, 1) + size[i] - 1) / size[i];
  }
  const int64_t count = first[many];
  const bool whole = count == many;
  // Sequences that begin with the same block share keys: the tasks at one position are ordered one after the other, so
  // that only the first reads from memory and the others from the processor's cache.
  struct Task {
    int64_t run, from, query;
  };
  std::vector<Task> tasks;
  tasks.reserve(static_cast<size_t>(count));
  bool shared_blocks = false;
  int64_t run = 0;
  for (int64_t i = 0; i < many; ++i) {
    const bool same = i > 0 && table[i / group * max_blocks] == table[(i - 1) / group * max_blocks];
    shared_blocks |= same;
    if (!same) run = i;
    for (int64_t from = 0; from < std::max(lengths[i / group], 1); from += size[i]) tasks.push_back({run, from, i});
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
  std::vector<std::atomic<int64_t>> missing(static_cast<size_t>(many));
  for (int64_t i = 0; i < many; ++i) missing[i] = first[i + 1] - first[i];

  share(count, threads, [&](int64_t begin, int64_t end) {
    std::vector<Part> own;
    std::vector<float> own_sums;
    if (whole) make(own, own_sums, 1);
    for (int64_t at = begin; at < end; ++at) {
      const int64_t from = tasks[at].from, i = tasks[at].query, b = i / group;
      const int to = int(std::min<int64_t>(from + size[i], lengths[b]));
      Part* into = whole ? own.data() : &parts[(first[i] + from / size[i]) * heads];
      instruction_set->attention->decode(paged, table + b * max_blocks, int(from), to, queries, i, into);
      // The thread that finishes a query's last part merges them: no barrier.
      if (missing[i].fetch_sub(1, std::memory_order_acq_rel) > 1) continue;
      Part* results = whole ? own.data() : &parts[first[i] * heads];
      for (int head = 0; head < heads; ++head) {
        merge(results + head, first[i + 1] - first[i], heads, head_dim);
        store(results[head], head_dim, Type(type), out, ((b * heads + head) * group + i % group) * head_dim);
      }
    }
  });
}

void xv_paged_prefill(const XvCache* cache, const void* q, const int32_t* table, void* out, int64_t start,
                      int64_t tokens, int64_t token_stride, int64_t head_stride, int group, int threads) {
  const PagedCache paged = paged_cache(*cache);
  const Rows queries{q, kBFloat16, token_stride, head_stride, group};
  const int64_t tiles = (tokens + kPrefillRows - 1) / kPrefillRows;
  // Tiles of one head are consecutive, so that its keys and values stay in the L2 cache.
  share(tiles * paged.heads * group, threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t from = (tiles - 1 - at % tiles) * kPrefillRows;
      const int rows = int(std::min<int64_t>(kPrefillRows, tokens - from));
      instruction_set->attention->prefill(paged, table, int(at / tiles), int(start), queries, int(from), rows,
                         static_cast<uint16_t*>(out));
    }
  });
}

}  // extern "C"
