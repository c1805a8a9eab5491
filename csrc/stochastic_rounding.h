// Rounds fp32 up or down with odds given by the discarded bits, from a stateless hash.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace spt {

// The finaliser "lowbias32": every output bit depends on every input bit.
SPT_INLINE uint32_t mix(uint32_t x) {
    x ^= x >> 16;
    x *= 0x7feb352du;
    x ^= x >> 15;
    x *= 0x846ca68bu;
    x ^= x >> 16;
    return x;
}

// The part of the hash that all positions of an entry share in one step.
SPT_INLINE uint32_t hash_prefix(uint32_t seed, uint32_t step, uint32_t entry_id) {
    return mix(seed ^ (step * 0x9e3779b9u)) ^ (entry_id * 0x85ebca6bu);
}

SPT_INLINE uint16_t float_to_bf16_stochastic(float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7f800000u) == 0x7f800000u) return float_to_bf16(value);  // inf, NaN
    return static_cast<uint16_t>((bits + (random & 0xffffu)) >> 16);
}

// Below fp16's normal range and above its largest number this rounds to nearest.
SPT_INLINE uint16_t float_to_fp16_stochastic(float value, uint32_t random) {
    const uint32_t bits = bits_of(value);
    const uint32_t magnitude = bits & 0x7fffffffu;
    if (magnitude < 0x38800000u || magnitude > 0x477fe000u) return float_to_fp16(value);
    const uint32_t rounded = (magnitude + (random & 0x1fffu) - 0x38000000u) >> 13;
    return static_cast<uint16_t>(((bits >> 16) & 0x8000u) | rounded);
}

}  // namespace spt
