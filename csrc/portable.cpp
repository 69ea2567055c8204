// Any processor: Arm's NEON comes by the compiler's own vectorisation.
#include "generic.h"
#include "steps.h"

namespace xv {
const Kernels kPortable = {"portable", generic_quantize, generic_tile_row<4>, generic_tile_row<8>, generic_store,
                           generic_dot_bf16, generic_rms_norm,
                        generic_silu_mul, generic_rotate};
}
