// What LoRA adapters add to linear layers, for tokens with different adapters (xverse_kernels.h): two small products for
// each adapter and layer, divided among threads so that one thread computes each sum.
#include <algorithm>
#include <vector>

#include "instruction_sets.h"
#include "parallel.h"
#include "xverse_kernels.h"

namespace {

using namespace xv;

constexpr int64_t kTokens = 8;      // of a piece of the first product
constexpr int64_t kOutputs = 1024;  // of a piece of the second
// With fewer values, waking threads takes longer than the work.
constexpr int64_t kSmallWork = 1 << 16;

struct Piece {
  const XvLora* lora;
  int layer;
  int64_t first, count;  // tokens; or outputs of the second product
  int64_t begin, end;    // tokens of the second product
};

}  // namespace

extern "C" {

void xv_lora(const void* x, void* const* y, const int64_t* outputs, int count, const XvLora* const* adapters,
             int adapter_count, const int64_t* bounds, int type, int64_t inputs, int threads) {
  const Kernels& table = *instruction_set->kernels;
  const int64_t width = size_of(type), first = bounds[0], tokens = bounds[adapter_count] - first;
  int64_t most = 0, work = 0;
  std::vector<Piece> downs, ups;
  for (int i = 0; i < adapter_count; ++i)
    for (int j = 0; j < count; ++j) {
      const XvLora& lora = adapters[i][j];
      const int64_t begin = bounds[i], end = bounds[i + 1];
      if (lora.a == nullptr || begin == end) continue;
      most = std::max(most, lora.rank);
      work += lora.rank * (inputs + outputs[j]);
      for (int64_t at = begin; at < end; at += kTokens)
        downs.push_back({&lora, j, at, std::min(kTokens, end - at), begin, end});
      for (int64_t at = 0; at < outputs[j]; at += kOutputs)
        ups.push_back({&lora, j, at, std::min(kOutputs, outputs[j] - at), begin, end});
    }
  if (downs.empty()) return;
  if (work < kSmallWork) threads = 1;
  std::vector<float> memory(static_cast<size_t>(tokens * count * most));
  const auto down_of = [&](int64_t token, int layer) { return &memory[size_t(((token - first) * count + layer) * most)]; };
  share(int64_t(downs.size()), threads, [&](int64_t begin, int64_t end) {
    std::vector<float> out(static_cast<size_t>(kTokens * most));
    for (int64_t at = begin; at < end; ++at) {
      const Piece& piece = downs[size_t(at)];
      const int rank = int(piece.lora->rank), rows = int(piece.count);
      const void* from = static_cast<const char*>(x) + piece.first * inputs * width;
      if (type == kFloat32)
        table.dot_f32(static_cast<const float*>(piece.lora->a), rank, static_cast<const float*>(from), rows, int(inputs),
                      out.data());
      else
        table.dot_bf16(static_cast<const uint16_t*>(piece.lora->a), rank, static_cast<const uint16_t*>(from), rows,
                       int(inputs), out.data());
      for (int t = 0; t < rows; ++t)
        std::copy_n(out.data() + t * rank, rank, down_of(piece.first + t, piece.layer));
    }
  });
  share(int64_t(ups.size()), threads, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const Piece& piece = ups[size_t(at)];
      const int64_t size = outputs[piece.layer];
      const void* b = static_cast<const char*>(piece.lora->b) + piece.first * width;
      for (int64_t token = piece.begin; token < piece.end; ++token)
        table.expand(b, Type(type), down_of(token, piece.layer), int(piece.lora->rank), size,
                     static_cast<char*>(y[piece.layer]) + (token * size + piece.first) * width, int(piece.count));
    }
  });
}

}  // extern "C"
