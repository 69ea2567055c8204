#include "instruction_sets.h"

#include <cstring>
#include <iterator>

#include "xverse_kernels.h"

namespace xv {
namespace {

bool any_processor() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

bool has_avx512_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }
#endif

// Best first; the last one runs everywhere. The names are those of xverse/kernels/native.py.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, &kAvx512Bf16, &kAttentionAvx512Bf16, &kTrainingAvx512, round_avx512,
     round_avx512_columns, &kTrainingAttention64, &kTrainingAttention128},
    {"avx512_vnni", has_avx512_vnni, &kAvx512, &kAttentionAvx512, &kTrainingAvx512, round_avx512, round_avx512_columns,
     nullptr, nullptr},
    {"avx2", has_avx2, &kAvx2, &kAttentionAvx2, &kTrainingAvx2, round_avx2, round_avx2_columns, nullptr, nullptr},
#endif
    {"portable", any_processor, &kPortable, &kAttentionPortable, &kTrainingPortable, round_portable,
     round_portable_columns, nullptr, nullptr},
};

}  // namespace

const InstructionSet* instruction_set = std::end(kInstructionSets) - 1;

}  // namespace xv

using namespace xv;

extern "C" const char* xv_select(const char* name) {
  for (const InstructionSet& set : kInstructionSets) {
    if ((*name != 0 && std::strcmp(name, set.name) != 0) || !set.supported()) continue;
    instruction_set = &set;
    return set.name;
  }
  return nullptr;
}
