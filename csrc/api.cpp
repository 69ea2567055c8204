// Weights, products and the steps between them (xverse_kernels.h): divides the work into blocks, and among threads.
#include <cstdlib>
#include <cstring>

#include "instruction_sets.h"
#include "parallel.h"
#include "xverse_kernels.h"
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace xv {

void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned) = nullptr;

namespace {

// Scratch memory of the calling thread, aligned to 64 bytes and kept for its next call.
struct Scratch {
  void* memory = nullptr;
  size_t size = 0;
  ~Scratch() { std::free(memory); }
  void* get(size_t bytes) {
    if (bytes > size) {
      std::free(memory);
      size = (bytes + 4095) / 4096 * 4096;
      memory = std::aligned_alloc(64, size);
      if (memory == nullptr) std::abort();  // hardly happens: Linux overcommits memory
    }
    return memory;
  }
};
thread_local Scratch scratch;

// With fewer values, waking threads takes longer than the work.
constexpr int64_t kSmallWork = 32768;

constexpr int64_t aligned(int64_t size) { return (size + 63) / 64 * 64; }

}  // namespace
}  // namespace xv

using namespace xv;

extern "C" {

void xv_use_openmp(void* function) {
  gomp_parallel = reinterpret_cast<void (*)(void (*)(void*), void*, unsigned, unsigned)>(function);
}

void xv_use_huge_pages(void* memory, int64_t size) {
#if defined(__linux__)
  const uintptr_t page = 4096, begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(size)) / page * page;
  if (size >= (1 << 21) && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)size;
#endif
}

void xv_quant_linear(const void* x, const uint8_t* const* tiles, void* const* y, const int64_t* outputs, int count,
                     int type, int64_t tokens, int64_t inputs, int format, int group, int threads) {
  const Kernels& table = *instruction_set->kernels;
  const int64_t groups = inputs / group, most = table.block;
  const int64_t weight_bytes = row_bytes(format, inputs, group);
  const int64_t blocks = (tokens + most - 1) / most;
  const int64_t value_bytes = aligned(inputs * most), scale_bytes = aligned(groups * most * 4);
  const int64_t block_bytes = value_bytes + 2 * scale_bytes;
  auto* memory = static_cast<int8_t*>(scratch.get(size_t(block_bytes * blocks)));

  const auto block_at = [&](int64_t index) {
    int8_t* start = memory + index * block_bytes;
    const int64_t left = tokens - index * most;
    return Tokens{int(left < most ? left : most), start,
                  reinterpret_cast<float*>(start + value_bytes),
                  reinterpret_cast<int32_t*>(start + value_bytes + scale_bytes)};
  };
  const int64_t size = size_of(type);
  const auto place = [&](void* from, int64_t at) { return static_cast<char*>(from) + at * size; };
  constexpr int64_t kGroups = 8;  // groups of one token block that are quantised as one piece of work
  const int64_t pieces = (groups + kGroups - 1) / kGroups;
  share(blocks * pieces, tokens * inputs < kSmallWork / 2 ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t b = piece / pieces, first = piece % pieces * kGroups;
      const int64_t width = (groups - first < kGroups ? groups - first : kGroups) * group;
      const Tokens block = block_at(b);
      table.quantize(static_cast<const char*>(x) + (b * most * inputs + first * group) * size, Type(type), inputs,
                     block.count, int(width), group, bias_of(format), const_cast<int8_t*>(block.values) + first * group * block.count,
                     const_cast<float*>(block.scales) + first * block.count,
                     const_cast<int32_t*>(block.offsets) + first * block.count);
    }
  });
  int64_t tile_rows = 0;
  for (int i = 0; i < count; ++i) tile_rows += (outputs[i] + kTileRows - 1) / kTileRows;
  const TileRow tile_row = row_product(table, format);
  share(tile_rows, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float out[kMaxTokens * kTileRows];
    int weight = 0;
    int64_t before = 0;  // tile rows of the weights before this one
    for (int64_t row = begin; row < end; ++row) {
      int64_t weight_rows = (outputs[weight] + kTileRows - 1) / kTileRows;
      while (row - before >= weight_rows) {
        before += weight_rows;
        weight_rows = (outputs[++weight] + kTileRows - 1) / kTileRows;
      }
      const int64_t first = (row - before) * kTileRows, width = outputs[weight];
      const int rows = int(width - first < kTileRows ? width - first : kTileRows);
      const uint8_t* tile = tiles[weight] + (row - before) * weight_bytes;
      for (int64_t b = 0; b < blocks; ++b) {  // the row of tiles stays in the L2 cache for all blocks
        const Tokens block = block_at(b);
        tile_row(tile, block, int(inputs), group, out);
        for (int t = 0; t < block.count; ++t)
          table.store(out + t * kTileRows, place(y[weight], (b * most + t) * width + first), Type(type), rows);
      }
    }
  });
}

void xv_linear(const void* x, const void* w, void* y, int type, int64_t tokens, int64_t outputs, int64_t inputs,
               int threads) {
  constexpr int64_t kBlock = 64;  // tokens at a time: their inputs stay in the L2 cache
  const int64_t rows_at_once = tokens > 8 ? 96 : 24, width = size_of(type);
  const Kernels& table = *instruction_set->kernels;
  const auto at = [&](const void* array, int64_t index) { return static_cast<const char*>(array) + index * width; };
  share((outputs + rows_at_once - 1) / rows_at_once, threads, [&](int64_t begin, int64_t end) {
    float out[kBlock * 96];
    for (int64_t part = begin; part < end; ++part) {
      const int64_t first = part * rows_at_once;
      const int rows = int(outputs - first < rows_at_once ? outputs - first : rows_at_once);
      for (int64_t block = 0; block < tokens; block += kBlock) {
        const int count = int(tokens - block < kBlock ? tokens - block : kBlock);
        const void *weights = at(w, first * inputs), *inputs_of = at(x, block * inputs);
        if (type == kFloat32)
          table.dot_f32(static_cast<const float*>(weights), rows, static_cast<const float*>(inputs_of), count,
                        int(inputs), out);
        else
          table.dot_bf16(static_cast<const uint16_t*>(weights), rows, static_cast<const uint16_t*>(inputs_of), count,
                         int(inputs), out);
        for (int t = 0; t < count; ++t)
          table.store(out + t * rows, const_cast<char*>(at(y, (block + t) * outputs + first)), Type(type), rows);
      }
    }
  });
}

void xv_rms_norm(const void* x, const void* weight, void* y, int type, int weight_type, int64_t rows, int64_t size,
                 float eps, int threads) {
  const int64_t bytes = size_of(type) * size;
  share(rows, rows * size < kSmallWork ? 1 : threads, [&](int64_t begin, int64_t end) {
    instruction_set->kernels->rms_norm(static_cast<const char*>(x) + begin * bytes, weight,
                                       static_cast<char*>(y) + begin * bytes, Type(type), Type(weight_type),
                                       end - begin, int(size), eps);
  });
}

void xv_silu_mul(const void* gate, const void* up, void* y, int type, int64_t count, int threads) {
  constexpr int64_t kPart = 4096;
  const int64_t width = size_of(type);
  share((count + kPart - 1) / kPart, count < kSmallWork ? 1 : threads, [&](int64_t begin, int64_t end) {
    const int64_t at = begin * kPart * width, values = (end * kPart < count ? end * kPart : count) - begin * kPart;
    instruction_set->kernels->silu_mul(static_cast<const char*>(gate) + at, static_cast<const char*>(up) + at,
                                       static_cast<char*>(y) + at, Type(type), values);
  });
}

void xv_rotate(void* q, void* k, const void* cos, const void* sin, int type, int64_t tokens, int heads,
               int key_heads, int head_dim, int threads) {
  const Kernels& table = *instruction_set->kernels;
  const int64_t width = size_of(type), row = int64_t(head_dim) * width;
  share(tokens, tokens * heads * head_dim < kSmallWork ? 1 : threads, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const void* cosines = static_cast<const char*>(cos) + t * head_dim * width;
      const void* sines = static_cast<const char*>(sin) + t * head_dim * width;
      table.rotate(static_cast<char*>(q) + t * heads * row, cosines, sines, Type(type), heads, head_dim);
      table.rotate(static_cast<char*>(k) + t * key_heads * row, cosines, sines, Type(type), key_heads, head_dim);
    }
  });
}

void xv_round(const float* weight, const float* importance, int8_t* q, uint16_t* scales, int64_t rows, int64_t inputs,
              int bits, const int8_t* table, int group, const float* divisors, int count,
              int threads) {
  const Rounding settings{inputs, {bits, table}, group, divisors, count};
  const int64_t groups = inputs / group;
  share(rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      instruction_set->round_row(settings, weight + row * inputs, importance, q + row * inputs, scales + row * groups);
  });
}

void xv_round_columns(const float* weight, float* shift, const float* feedback, const float* scales,
                      const int32_t* group_of, int8_t* q, float* errors, int64_t rows, int64_t stride, int64_t groups,
                      int count, int bits, const int8_t* table, int threads) {
  const Columns columns{count, {bits, table}, feedback, group_of};
  share(rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      instruction_set->round_columns(columns, weight + row * stride, shift + row * count, scales + row * groups,
                                     q + row * stride, errors + row * stride);
  });
}

}  // extern "C"
