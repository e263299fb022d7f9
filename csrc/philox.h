// Philox-4x32-10 and the rule that draws a mask from a seed.
//
// A seeded mask is never stored. Whoever needs to know whether an entry is selected computes one random word
// from (seed, draw, tensor key, entry) and compares it with a threshold. Every backend and every rank must
// get the same word, bit for bit, so the whole rule stands here once and is compiled for the CPU and for the
// GPU from this text. The same rule in PyTorch: sparse_optim/backends/reference.py, philox_words.

#pragma once

#include <cstdint>

#include "host_device.h"

namespace sparse_optim {

struct FourWords {
    uint32_t word[4];
};

// Philox-4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers, as easy as 1, 2, 3; SC 2011): a
// bijection of the 128-bit counter for each 64-bit key, ten rounds of two multiplications each. No state, so
// any word can be had alone.
SPARSE_OPTIM_HOST_DEVICE FourWords philox_4x32_10(FourWords counter, uint64_t seed) {
    uint32_t key_low = static_cast<uint32_t>(seed);
    uint32_t key_high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t product_0 = uint64_t{0xD2511F53u} * counter.word[0];
        const uint64_t product_2 = uint64_t{0xCD9E8D57u} * counter.word[2];
        counter = FourWords{{static_cast<uint32_t>(product_2 >> 32) ^ counter.word[1] ^ key_low,
                             static_cast<uint32_t>(product_2),
                             static_cast<uint32_t>(product_0 >> 32) ^ counter.word[3] ^ key_high,
                             static_cast<uint32_t>(product_0)}};
        // the key moves on by the fractions of the golden ratio and of the square root of 3
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return counter;
}

// One Philox call yields four words, and the four must not belong to four neighbours: on a GPU each thread
// would then write (or read) four adjacent entries, and neighbouring threads would be four entries apart. So
// a tensor is cut into tiles of 1024 entries, each tile into four quarters of 256, and the call number `lane`
// of a tile serves the entry `lane` of every quarter: the accesses of a block of threads stay contiguous in
// each quarter.
//
//     entry = 1024 * tile + 256 * quarter + lane        counter = 256 * tile + lane        word = quarter
//
// Entries are global: row-major positions in the full tensor, whatever part of it this process holds.
constexpr uint64_t kTileEntries = 1024;
constexpr uint64_t kQuarterEntries = 256;

SPARSE_OPTIM_HOST_DEVICE uint64_t counter_of_entry(uint64_t entry) {
    return entry / kTileEntries * kQuarterEntries + entry % kQuarterEntries;
}

SPARSE_OPTIM_HOST_DEVICE uint64_t quarter_of_entry(uint64_t entry) {
    return entry % kTileEntries / kQuarterEntries;
}

SPARSE_OPTIM_HOST_DEVICE uint64_t entry_of_counter(uint64_t counter, uint64_t quarter) {
    return counter / kQuarterEntries * kTileEntries + quarter * kQuarterEntries + counter % kQuarterEntries;
}

// The words of the four entries that share a counter, in the order of their quarters. `draw` counts masks
// (its top four bits name the purpose of the words), `tensor_key` names the tensor.
SPARSE_OPTIM_HOST_DEVICE FourWords seeded_words(uint64_t seed, uint32_t draw, uint32_t tensor_key,
                                                uint64_t counter) {
    return philox_4x32_10(
        FourWords{{static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), draw, tensor_key}},
        seed);
}

// The word of one entry: for a single decision, or where the neighbours in the other quarters are not wanted.
SPARSE_OPTIM_HOST_DEVICE uint32_t seeded_word(uint64_t seed, uint32_t draw, uint32_t tensor_key,
                                              uint64_t entry) {
    const FourWords four = seeded_words(seed, draw, tensor_key, counter_of_entry(entry));
    // not word[quarter]: an array with a place that is not known beforehand lies in memory on a GPU
    switch (quarter_of_entry(entry)) {
        case 0:
            return four.word[0];
        case 1:
            return four.word[1];
        case 2:
            return four.word[2];
        default:
            return four.word[3];
    }
}

// `threshold` is floor(keep * 2^32). It has 33 bits: keep = 1 selects every word, the largest included.
SPARSE_OPTIM_HOST_DEVICE bool is_selected(uint32_t word, uint64_t threshold) {
    return word < threshold;
}

}  // namespace sparse_optim
