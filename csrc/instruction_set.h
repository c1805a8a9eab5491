// Decides at run time which vector instructions the kernels may use.
#pragma once

// A function marked with one of these may use the named instructions, whatever the build flags.
#if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
#    define SPT_X86 1
#    define SPT_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#    if defined(SPT_EMULATE_AVX512)  // to test that code on a processor with AVX2
#        define SPT_TARGET_AVX512 SPT_TARGET_AVX2
#    else
#        define SPT_TARGET_AVX512 __attribute__((target("avx2,fma,f16c,avx512f")))
#    endif
#else
#    define SPT_X86 0
#endif

#if defined(__GNUC__)
#    define SPT_INLINE inline __attribute__((always_inline))
#    define SPT_PREFETCH(address) __builtin_prefetch(address)
#    define SPT_PREFETCH_OUTER(address) __builtin_prefetch(address, 0, 2)  // second level
#else
#    define SPT_INLINE inline
#    define SPT_PREFETCH(address)
#    define SPT_PREFETCH_OUTER(address)
#endif

namespace spt {

enum class InstructionSet { portable = 0, avx2 = 1, avx512 = 2 };

// The best set that this processor has, or the limit if that is lower.
InstructionSet instruction_set();

// Lowers the best set for the whole process, so that the other code paths can be tested.
void limit_instruction_set(InstructionSet limit);

}  // namespace spt
