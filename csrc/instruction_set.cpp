// Decides at run time which vector instructions the kernels may use.
#include "instruction_set.h"

#include <algorithm>
#include <atomic>

namespace spt {
namespace {

std::atomic<int> limit_of_process{static_cast<int>(InstructionSet::avx512)};

int detect() {
#if SPT_X86
    __builtin_cpu_init();
    // f16c is not asked for by name, older compilers do not know it: every AVX2 processor has it
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
#    if defined(SPT_EMULATE_AVX512)
        const bool wide = true;
#    else
        const bool wide = __builtin_cpu_supports("avx512f");
#    endif
        return static_cast<int>(wide ? InstructionSet::avx512 : InstructionSet::avx2);
    }
#endif
    return static_cast<int>(InstructionSet::portable);
}

}  // namespace

InstructionSet instruction_set() {
    static const int detected = detect();
    return static_cast<InstructionSet>(
        std::min(detected, limit_of_process.load(std::memory_order_relaxed)));
}

void limit_instruction_set(InstructionSet limit) {
    limit_of_process.store(static_cast<int>(limit), std::memory_order_relaxed);
}

}  // namespace spt
