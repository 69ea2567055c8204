// Rounding one row of a weight to groups of integers; rounding.cpp, compiled once for each instruction set.
#pragma once

#include <cstdint>

namespace xv {

// What a weight in units of its scale is rounded to: integers of some bits, or the nearest entry of `table` [2^bits],
// in ascending order; null without.
struct Levels {
  int bits;
  const int8_t* table;
};

struct Rounding {
  int64_t inputs;
  Levels levels;
  int group;
  const float* divisors;  // [count]: the scales to try are a group's largest magnitude divided by each
  int count;
};

// weight, importance, q [inputs]; scales bfloat16 [inputs / group].
using RoundRow = void (*)(const Rounding& settings, const float* weight, const float* importance, int8_t* q,
                          uint16_t* scales);

// A block of columns that are rounded in order, the error of each moved to those after it.
struct Columns {
  int count;
  Levels levels;
  const float* feedback;    // [count, count]: row j is the share of column j's error that each column takes
  const int32_t* group_of;  // [count]: the scale of each column
};

// weight [count]; shift [count], what the columns take of errors before the block, is overwritten; scales [groups];
// out: q [count], errors [count] of the weight itself.
using RoundColumns = void (*)(const Columns& columns, const float* weight, float* shift, const float* scales, int8_t* q,
                              float* errors);

void round_portable(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
void round_portable_columns(const Columns&, const float*, float*, const float*, int8_t*, float*);
#if defined(__x86_64__)
void round_avx2(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
void round_avx2_columns(const Columns&, const float*, float*, const float*, int8_t*, float*);
void round_avx512(const Rounding&, const float*, const float*, int8_t*, uint16_t*);
void round_avx512_columns(const Columns&, const float*, float*, const float*, int8_t*, float*);
#endif

}  // namespace xv
