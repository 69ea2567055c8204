// For any processor. On Arm the compiler vectorises this for NEON.
#include "generic.h"
#include "steps.h"

namespace xv {
const Kernels kPortable = {generic_quantize, generic_tile_row<4>, generic_tile_row<8>, generic_store, generic_dot_bf16,
                           generic_rms_norm, generic_silu_mul, generic_rotate};
}  // namespace xv
