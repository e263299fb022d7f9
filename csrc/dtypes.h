// The stored dtypes, what their bits mean, and the order of scores, compiled for the CPU and for the GPU from
// this text. Conversions are done on the bits, without branches: loops over them vectorise, and the tests of
// the CPU are tests of the GPU.

#pragma once

#include <bit>
#include <cstdint>

#include "host_device.h"

namespace sparse_optim {

enum class Dtype : uint8_t { kFloat64, kFloat32, kBFloat16, kFloat16 };

SPARSE_OPTIM_HOST_DEVICE int64_t bytes_of(Dtype dtype) {
    return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

constexpr uint32_t kInfinity = 0x7F800000;

SPARSE_OPTIM_HOST_DEVICE bool is_finite(float value) {
    return (std::bit_cast<uint32_t>(value) & kInfinity) != kInfinity;
}

SPARSE_OPTIM_HOST_DEVICE float float_of_bfloat16(uint16_t bits) {
    return std::bit_cast<float>(uint32_t{bits} << 16);
}

// to nearest, ties to even; every NaN becomes the usual one
SPARSE_OPTIM_HOST_DEVICE uint16_t bfloat16_of(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
    return static_cast<uint16_t>((bits & ~(1u << 31)) > kInfinity ? 0x7FC0 : rounded);
}

// Up or down: the low half of a word is added below the bits that stay, and the rest is cut off. See
// reference.round_stochastically.
SPARSE_OPTIM_HOST_DEVICE uint16_t bfloat16_at_random(float value, uint32_t word) {
    const uint32_t carried = (std::bit_cast<uint32_t>(value) + (word & 0xFFFF)) >> 16;
    return static_cast<uint16_t>(is_finite(value) ? carried : bfloat16_of(value));
}

// Exponents move by exact multiplications, and a denormal goes through the low bits of 0.5.
SPARSE_OPTIM_HOST_DEVICE float float_of_half(uint16_t half) {
    const uint32_t wide = uint32_t{half} << 16;
    const uint32_t sign = wide & 0x80000000;
    const uint32_t twice = wide + wide;
    const float normal = std::bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float denormal = std::bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
    const uint32_t bits = std::bit_cast<uint32_t>(twice < 1u << 27 ? denormal : normal);
    return std::bit_cast<float>(sign | bits);
}

SPARSE_OPTIM_HOST_DEVICE uint16_t half_of(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const uint32_t sign = bits & 0x80000000;
    const uint32_t twice = bits + bits;
    const float magnitude = std::bit_cast<float>(bits & 0x7FFFFFFF);
    // overflows to infinity where half does, then comes back to where its bits can be read off
    const float scaled = magnitude * 0x1.0p+112f * 0x1.0p-110f;
    const uint32_t bias = (twice & 0xFF000000) > 0x71000000u ? twice & 0xFF000000 : 0x71000000u;
    const uint32_t shifted = std::bit_cast<uint32_t>(std::bit_cast<float>((bias >> 1) + 0x07800000) + scaled);
    const uint32_t rounded = (shifted >> 13 & 0x7C00) + (shifted & 0x0FFF);
    return static_cast<uint16_t>((sign >> 16) | (twice > 0xFF000000 ? 0x7E00 : rounded));
}

// Orders as signed integers do, like the scores themselves. reference._sort_keys has the same order in
// unsigned numbers: this with the highest bit flipped. There -0.0 counts as 0.0; here it is -1, which is
// nothing else, and whoever compares puts it with 0.
template <bool kMagnitude>
SPARSE_OPTIM_HOST_DEVICE int32_t sort_key(float score) {
    const int32_t bits = std::bit_cast<int32_t>(score);
    return kMagnitude ? bits & 0x7FFFFFFF : bits ^ (bits >> 31 & 0x7FFFFFFF);
}

SPARSE_OPTIM_HOST_DEVICE float without_negative_zero(float score) {
    return std::bit_cast<uint32_t>(score) == 0x80000000 ? 0.0f : score;
}

// The keys of bfloat16 are the high halves of those of float32.
SPARSE_OPTIM_HOST_DEVICE int low_bits(Dtype dtype) {
    return dtype == Dtype::kBFloat16 ? 16 : 0;
}

}  // namespace sparse_optim
