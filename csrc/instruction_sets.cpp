#include "instruction_sets.h"

#include <cstring>
#include <iterator>
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "xverse_kernels.h"

namespace xv {
namespace {

bool any_processor() { return true; }

#if defined(__x86_64__)
bool has_avx2() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

// With the processor's AVX2 state, which the operating system must have enabled.
bool has_avx_vnni() {
  unsigned a, b, c, d;
  if (!has_avx2() || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || a < 1) return false;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & (1u << 4));
}

bool has_avx512_vnni() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

// Linux gives a process the registers of the tiles on request, which may be repeated.
bool has_avx512_amx() {
#if defined(__linux__)
  constexpr unsigned kTilesAndInt8 = 3u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kTilesAndInt8) == kTilesAndInt8 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(__aarch64__)
#if defined(__APPLE__)
bool has_feature(const char* name) {
  int value = 0;
  size_t size = sizeof(value);
  return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dot_product() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dot_product() && has_feature("hw.optional.arm.FEAT_I8MM"); }
bool has_bf16() { return has_i8mm() && has_feature("hw.optional.arm.FEAT_BF16"); }
#elif defined(__linux__)
bool has_dot_product() { return getauxval(AT_HWCAP) & (1ul << 20); }  // HWCAP_ASIMDDP
bool has_i8mm() { return has_dot_product() && (getauxval(AT_HWCAP2) & (1ul << 13)); }  // HWCAP2_I8MM
bool has_bf16() { return has_i8mm() && (getauxval(AT_HWCAP2) & (1ul << 14)); }  // HWCAP2_BF16
#else
bool has_dot_product() { return false; }
bool has_i8mm() { return false; }
bool has_bf16() { return false; }
#endif
#endif

// Best first; the last one runs everywhere. The names are those of xverse/kernels/native.py.
const InstructionSet kInstructionSets[] = {
#if defined(__x86_64__)
    {"avx512_amx", has_avx512_amx, &kAvx512Amx, &kAttentionAvx512Bf16, &kTrainingAvx512, round_avx512,
     round_avx512_columns, &kTrainingAttention64, &kTrainingAttention128},
    {"avx512_bf16", has_avx512_bf16, &kAvx512Bf16, &kAttentionAvx512Bf16, &kTrainingAvx512, round_avx512,
     round_avx512_columns, &kTrainingAttention64, &kTrainingAttention128},
    {"avx512_vnni", has_avx512_vnni, &kAvx512, &kAttentionAvx512, &kTrainingAvx512, round_avx512, round_avx512_columns,
     nullptr, nullptr},
    {"avx_vnni", has_avx_vnni, &kAvxVnni, &kAttentionAvx2, &kTrainingAvx2, round_avx2, round_avx2_columns, nullptr,
     nullptr},
    {"avx2", has_avx2, &kAvx2, &kAttentionAvx2, &kTrainingAvx2, round_avx2, round_avx2_columns, nullptr, nullptr},
#elif defined(__aarch64__)
    {"neon_bf16", has_bf16, &kNeonBf16, &kAttentionPortable, &kTrainingPortable, round_portable,
     round_portable_columns, nullptr, nullptr},
    {"neon_i8mm", has_i8mm, &kNeonI8mm, &kAttentionPortable, &kTrainingPortable, round_portable,
     round_portable_columns, nullptr, nullptr},
    {"neon_dot", has_dot_product, &kNeonDot, &kAttentionPortable, &kTrainingPortable, round_portable,
     round_portable_columns, nullptr, nullptr},
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
