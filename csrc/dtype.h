// Converts between fp32 and the two 16-bit floating dtypes.
#pragma once

#include <cstdint>
#include <cstring>

#include "instruction_set.h"

namespace spt {

// The numbers are those that spt_kernels/native/layout.py passes.
enum class DType : int { fp32 = 0, bf16 = 1, fp16 = 2 };

SPT_INLINE uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

SPT_INLINE float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

SPT_INLINE float bf16_to_float(uint16_t half) {
    return float_of(static_cast<uint32_t>(half) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
SPT_INLINE uint16_t float_to_bf16(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

SPT_INLINE float fp16_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
    if (magnitude < 0x0400u) {  // subnormal: a multiple of 2^-24, which fp32 holds exactly
        return float_of(sign | bits_of(static_cast<float>(magnitude) * 0x1p-24f));
    }
    return float_of(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest, ties to even; NaN stays NaN.
SPT_INLINE uint16_t float_to_fp16(float value) {
    const uint32_t bits = bits_of(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up
    if (magnitude < 0x38800000u) {  // below 2^-14: adding 0.5 leaves the multiple of 2^-24
        const uint32_t rounded = bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f);
        return static_cast<uint16_t>(sign | rounded);
    }
    const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
    return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// How each dtype is held in memory, read and written.
template <DType dtype>
struct Storage;

template <>
struct Storage<DType::fp32> {
    using type = float;
    static SPT_INLINE float read(float stored) { return stored; }
    static SPT_INLINE float round(float value) { return value; }
};

template <>
struct Storage<DType::bf16> {
    using type = uint16_t;
    static SPT_INLINE float read(uint16_t stored) { return bf16_to_float(stored); }
    static SPT_INLINE uint16_t round(float value) { return float_to_bf16(value); }
};

template <>
struct Storage<DType::fp16> {
    using type = uint16_t;
    static SPT_INLINE float read(uint16_t stored) { return fp16_to_float(stored); }
    static SPT_INLINE uint16_t round(float value) { return float_to_fp16(value); }
};

// Calls `visit` with a Storage<dtype> value, so that the choice is made once per call.
template <typename Visit>
void with_storage(DType dtype, Visit&& visit) {
    switch (dtype) {
        case DType::fp32:
            return visit(Storage<DType::fp32>{});
        case DType::bf16:
            return visit(Storage<DType::bf16>{});
        case DType::fp16:
            return visit(Storage<DType::fp16>{});
    }
}

}  // namespace spt
