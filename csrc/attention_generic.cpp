// For any processor; compiled again for x86 with AVX2 and FMA, where the compiler's vectors are wider.
#include "attention_lanes.h"

namespace xv {
#if defined(__AVX2__)
const AttentionKernels kAttentionAvx2 = {generic_decode, generic_append, prefill_lanes};
#else
const AttentionKernels kAttentionPortable = {generic_decode, generic_append, prefill_lanes};
#endif
}  // namespace xv
