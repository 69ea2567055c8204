// Rounding one row of a weight to groups of integers; rounding.cpp, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace xv {

struct Rounding {
  int64_t inputs;
  int bits, group;
  const float* divisors;  // [count]: the scales to try are a group's largest magnitude divided by each
  int count;
};

// weight, importance, q [inputs]; scales bfloat16 [inputs / group].
using RoundRow = void (*)(const Rounding& settings, const float* weight, const float* importance, int8_t* q,
                          uint16_t* scales);

void round_portable(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
#if defined(__x86_64__)
void round_avx2(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
void round_avx512(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
#endif

}  // namespace xv
