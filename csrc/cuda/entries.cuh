// How kernels find and read their entries.
//
// A launch takes the rows of several tensors as its argument: no table is copied to the device, and the host
// never waits. Each block looks its row up, and works on a tile of 4096 entries of it: four tiles of the
// seeded rule, of which every thread has kEntries neighbours in each of the four quarters, so that one Philox
// call serves one entry of each quarter and all accesses are 16 bytes wide. A full tile of an aligned tensor
// is read like that; any other entry by entry, in bounds.

#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "../adamw.h"
#include "../philox.h"
#include "../verbs.h"
#include "launch.h"

namespace sparse_optim::cuda {

// what every GPU and every version of CUDA takes as an argument
constexpr size_t kMostArgumentBytes = 4096;
constexpr int64_t kTile = 4 * kTileEntries;

// dtypes as types; Any is read and written by a switch over the dtype, whatever it is
template <Dtype kDtype, typename RawType>
struct Stored {
    using Raw = RawType;
    static constexpr Dtype dtype = kDtype;
};
using F64 = Stored<Dtype::kFloat64, double>;
using F32 = Stored<Dtype::kFloat32, float>;
using BF16 = Stored<Dtype::kBFloat16, uint16_t>;
using F16 = Stored<Dtype::kFloat16, uint16_t>;
struct Any {
    using Raw = float;
};

template <Dtype kDtype, typename T, typename Raw>
__device__ __forceinline__ T widened(Raw raw) {
    if constexpr (kDtype == Dtype::kBFloat16) {
        return static_cast<T>(float_of_bfloat16(raw));
    } else if constexpr (kDtype == Dtype::kFloat16) {
        return static_cast<T>(float_of_half(raw));
    } else {
        return static_cast<T>(raw);
    }
}

template <Dtype kDtype, typename Raw, typename T>
__device__ __forceinline__ Raw narrowed(T value) {
    if constexpr (kDtype == Dtype::kBFloat16) {
        return bfloat16_of(static_cast<float>(value));
    } else if constexpr (kDtype == Dtype::kFloat16) {
        return half_of(static_cast<float>(value));
    } else {
        return static_cast<Raw>(value);
    }
}

template <typename T>
__device__ __forceinline__ T load_any(const void* data, Dtype dtype, int64_t i) {
    switch (dtype) {
        case Dtype::kFloat64:
            return static_cast<T>(static_cast<const double*>(data)[i]);
        case Dtype::kFloat32:
            return static_cast<T>(static_cast<const float*>(data)[i]);
        case Dtype::kBFloat16:
            return static_cast<T>(float_of_bfloat16(static_cast<const uint16_t*>(data)[i]));
        default:
            return static_cast<T>(float_of_half(static_cast<const uint16_t*>(data)[i]));
    }
}

template <typename T>
__device__ __forceinline__ void store_any(void* data, Dtype dtype, int64_t i, T value) {
    switch (dtype) {
        case Dtype::kFloat64:
            static_cast<double*>(data)[i] = static_cast<double>(value);
            return;
        case Dtype::kFloat32:
            static_cast<float*>(data)[i] = static_cast<float>(value);
            return;
        case Dtype::kBFloat16:
            static_cast<uint16_t*>(data)[i] = bfloat16_of(static_cast<float>(value));
            return;
        default:
            static_cast<uint16_t*>(data)[i] = half_of(static_cast<float>(value));
    }
}

// A value as it is after it was stored.
template <typename T>
__device__ __forceinline__ T rounded_to(Dtype dtype, T value) {
    switch (dtype) {
        case Dtype::kFloat64:
            return value;
        case Dtype::kFloat32:
            return static_cast<T>(static_cast<float>(value));
        case Dtype::kBFloat16:
            return static_cast<T>(float_of_bfloat16(bfloat16_of(static_cast<float>(value))));
        default:
            return static_cast<T>(float_of_half(half_of(static_cast<float>(value))));
    }
}

__device__ __forceinline__ double read(const Number& number) {
    return number.address == nullptr ? number.value : load_any<double>(number.address, number.dtype, 0);
}

// `kEntries` neighbours of an array, from `start` on. Those that are not selected are written with the bits
// that were read, or not at all.
template <typename Tag, typename T, int kEntries>
struct Entries {
    using Raw = typename Tag::Raw;
    static constexpr int kBytes = kEntries * static_cast<int>(sizeof(Raw));
    struct alignas(kBytes < 16 ? kBytes : 16) Pack {
        Raw raw[kEntries];
    };
    Pack pack;

    template <bool kFull>
    __device__ __forceinline__ void load(const Array& array, int64_t start, int64_t numel) {
        const Raw* const data = static_cast<const Raw*>(array.data) + start;
        if constexpr (kFull) {
            pack = *reinterpret_cast<const Pack*>(data);
        } else {
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                pack.raw[i] = start + i >= 0 && start + i < numel ? data[i] : Raw(0);
            }
        }
    }
    __device__ __forceinline__ T get(int i) const { return widened<Tag::dtype, T>(pack.raw[i]); }
    __device__ __forceinline__ void set(int i, T value) { pack.raw[i] = narrowed<Tag::dtype, Raw>(value); }
    __device__ __forceinline__ void set_bfloat16(int i, uint16_t raw) { pack.raw[i] = raw; }

    template <bool kFull>
    __device__ __forceinline__ void store(const Array& array, int64_t start, uint32_t bits) const {
        Raw* const data = static_cast<Raw*>(array.data) + start;
        if constexpr (kFull) {
            if constexpr (kBytes % 16 == 0) {
                // by name, because the compiler would take a plain store of a struct apart
#pragma unroll
                for (int i = 0; i < kBytes / 16; ++i) {
                    uint4 vector;
                    std::memcpy(&vector, reinterpret_cast<const char*>(pack.raw) + 16 * i, 16);
                    __stwb(reinterpret_cast<uint4*>(data) + i, vector);
                }
            } else {
                *reinterpret_cast<Pack*>(data) = pack;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                if (bits >> i & 1) {
                    data[i] = pack.raw[i];
                }
            }
        }
    }
};

template <typename T, int kEntries>
struct Entries<Any, T, kEntries> {
    T values[kEntries];

    template <bool kFull>
    __device__ __forceinline__ void load(const Array& array, int64_t start, int64_t numel) {
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            const bool inside = kFull || (start + i >= 0 && start + i < numel);
            values[i] = inside ? load_any<T>(array.data, array.dtype, start + i) : T(0);
        }
    }
    __device__ __forceinline__ T get(int i) const { return values[i]; }
    __device__ __forceinline__ void set(int i, T value) { values[i] = value; }
    __device__ __forceinline__ void set_bfloat16(int i, uint16_t raw) { values[i] = float_of_bfloat16(raw); }

    template <bool kFull>
    __device__ __forceinline__ void store(const Array& array, int64_t start, uint32_t bits) const {
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            if (bits >> i & 1) {
                store_any(array.data, array.dtype, start + i, values[i]);
            }
        }
    }
};

// Rows of tensors, and the first block of each. All of `Args` is one argument of the kernel.
template <typename Row, typename Shared>
struct Rows {
    static constexpr size_t kMost =
        (kMostArgumentBytes - sizeof(Shared) - 64) / (sizeof(Row) + sizeof(uint32_t));
    Shared shared;
    Row rows[kMost];
    uint32_t first[kMost + 1];
    int count;

    // the row that a block works on; its blocks count from 0
    __device__ __forceinline__ int row_of(uint32_t& block) const {
        int low = 0, high = count;
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (first[middle] <= block) {
                low = middle;
            } else {
                high = middle;
            }
        }
        block -= first[low];
        return low;
    }
};

// Launches a kernel for all rows, as many at a time as fit into its argument. `blocks(row)`: how many it
// needs. A launch has fewer than 2^31 blocks.
template <typename Row, typename Shared, typename Blocks>
void launch_rows(void (*kernel)(Rows<Row, Shared>), const std::vector<Row>& rows, const Shared& shared,
                 uint32_t threads, void* stream, const Blocks& blocks) {
    static_assert(sizeof(Rows<Row, Shared>) <= kMostArgumentBytes);
    Rows<Row, Shared> args;
    args.shared = shared;
    args.count = 0;
    args.first[0] = 0;
    const auto flush = [&] {
        if (args.first[args.count] != 0) {
            launch(kernel, args.first[args.count], threads, stream, args);
        }
        args.count = 0;
    };
    for (const Row& row : rows) {
        const int64_t needed = blocks(row);
        if (needed > std::numeric_limits<int32_t>::max()) {
            throw std::runtime_error("a tensor must have fewer than 2**43 entries; split it.");
        }
        if (args.count == static_cast<int>(args.kMost) ||
            args.first[args.count] + needed > std::numeric_limits<int32_t>::max()) {
            flush();
        }
        args.rows[args.count] = row;
        args.first[args.count + 1] = args.first[args.count] + static_cast<uint32_t>(needed);
        ++args.count;
    }
    flush();
}

inline int64_t tiles_of(int64_t numel, int64_t lead = 0) {
    return numel == 0 ? 0 : (lead + numel + kTile - 1) / kTile;
}

inline bool is_aligned(const Array& array, int64_t lead = 0) {
    return (reinterpret_cast<uintptr_t>(array.data) - static_cast<uint64_t>(lead * bytes_of(array.dtype))) %
               16 ==
           0;
}

// Whether 1024 local entries that begin with a tile of the kernel are one tile of the seeded rule.
inline bool has_whole_tiles(const Geometry& geometry, int64_t numel) {
    const bool run = geometry.inner >= numel;
    const auto tiles = static_cast<int64_t>(kTileEntries);
    return run ||
           (geometry.offset % tiles == 0 && geometry.inner % tiles == 0 && geometry.stride % tiles == 0);
}

// Whether every entry of a mask can be read 16 bytes at a time.
inline bool is_aligned(const Mask& mask, int64_t lead) {
    switch (mask.form) {
        case Form::kBits:
            return lead % 8 == 0;
        case Form::kScores:
            return is_aligned(mask.scores, lead);
        case Form::kSeeded:
            return has_whole_tiles(mask.geometry, mask.numel);
        default:
            return true;
    }
}

// The part of a tile that a thread has: kEntries neighbours in each quarter, from `start` on, which may lie
// before the tensor or beyond it.
template <int kEntries>
struct Part {
    static constexpr int kThreads = static_cast<int>(kTile) / (4 * kEntries);
    int64_t start;

    __device__ __forceinline__ Part(int64_t tile, int64_t lead) {
        constexpr int kThreadsPerTile = kThreads / 4;
        const int64_t first = tile * kTile - lead;
        start = first + (threadIdx.x / kThreadsPerTile) * static_cast<int64_t>(kTileEntries) +
                (threadIdx.x % kThreadsPerTile) * kEntries;
    }
    __device__ __forceinline__ int64_t quarter(int number) const {
        return start + number * static_cast<int64_t>(kQuarterEntries);
    }
};

// One bit for each of the thread's entries, those of the first quarter first. What lies outside of the tensor
// is not selected.
template <int kEntries>
__device__ __forceinline__ uint32_t inside(const Part<kEntries>& part, int64_t numel) {
    uint32_t bits = 0;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
        const int64_t first = part.quarter(quarter);
        const int64_t before = first < 0 ? -first : 0, left = numel - first;
        if (left > 0 && before < kEntries) {
            const uint32_t upto = left >= kEntries ? (1u << kEntries) - 1 : (1u << left) - 1;
            bits |= (upto >> before << before) << (quarter * kEntries);
        }
    }
    return bits;
}

// The words of the thread's entries, whose tile of the seeded rule is whole. `use(entry, word)`.
template <int kEntries, typename Use>
__device__ __forceinline__ void draw(const Part<kEntries>& part, const Geometry& geometry, uint64_t seed,
                                     uint32_t draw, uint32_t key, const Use& use) {
    const uint64_t counter = counter_of_entry(static_cast<uint64_t>(global_index(part.start, geometry)));
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
        const FourWords four = seeded_words(seed, draw, key, counter + i);
#pragma unroll
        for (int quarter = 0; quarter < 4; ++quarter) {
            use(quarter * kEntries + i, four.word[quarter]);
        }
    }
}

// One of the words of a quarter. Not by its place, which is not known beforehand: the array would lie in
// memory.
template <int kWords>
__device__ __forceinline__ uint32_t of_quarter(const uint32_t (&words)[kWords], int quarter, int i) {
    constexpr int kEntries = kWords / 4;
    const uint32_t low = quarter == 0 ? words[i] : words[kEntries + i];
    const uint32_t high = quarter == 2 ? words[2 * kEntries + i] : words[3 * kEntries + i];
    return quarter < 2 ? low : high;
}

// What a kernel needs of a mask.
struct MaskRow {
    Geometry geometry;
    int64_t numel;
    Array array;  // bits or scores
    const int64_t *cut_key, *last_tie;
    uint32_t key;
    Form form;
    int16_t lead;

    MaskRow() = default;
    MaskRow(const Mask& mask, int64_t shorter)
        : geometry(mask.geometry),
          numel(mask.numel),
          array(mask.form == Form::kBits ? Array{const_cast<uint8_t*>(mask.bits)} : mask.scores),
          cut_key(mask.cut.key_address),
          last_tie(mask.cut.last_tie_address),
          key(mask.key),
          form(mask.form),
          lead(static_cast<int16_t>(shorter)) {}
};

// A cut, ready for comparisons: a finite score passes whose key is above, or equal and among the ties.
struct ReadyCut {
    uint32_t key;
    bool reachable;
    int64_t ties;  // leading local entries

    __device__ __forceinline__ ReadyCut(const int64_t* cut_key, const int64_t* last_tie,
                                        const Geometry& geometry, int64_t numel) {
        const int64_t wanted = *cut_key < 0 ? 0 : *cut_key;
        reachable = wanted < int64_t{1} << 32;
        key = reachable ? static_cast<uint32_t>(wanted) : 0xFFFFFFFF;
        ties = reachable ? entries_up_to(*last_tie, geometry, numel) : 0;
    }
    template <bool kMagnitude>
    __device__ __forceinline__ bool passes(float score, int shift, int64_t local) const {
        const float plain = without_negative_zero(score);
        const uint32_t own = (static_cast<uint32_t>(sort_key<kMagnitude>(plain)) ^ 0x80000000u) >> shift;
        return is_finite(score) && (own > key || (own == key && local < ties));
    }
};

template <bool kFull, bool kMagnitude, typename Tag, int kEntries>
__device__ __forceinline__ uint32_t passing(const Array& scores, const ReadyCut& cut, int64_t start,
                                            int64_t numel) {
    Entries<Tag, float, kEntries> values;
    values.template load<kFull>(scores, start, numel);
    const int shift = low_bits(scores.dtype);
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
        bits |= static_cast<uint32_t>(cut.template passes<kMagnitude>(values.get(i), shift, start + i)) << i;
    }
    return bits;
}

// The same for scores of any dtype.
template <bool kFull, bool kMagnitude, int kEntries>
__device__ __forceinline__ uint32_t passing(const Array& scores, const ReadyCut& cut, int64_t start,
                                            int64_t numel) {
    switch (scores.dtype) {
        case Dtype::kFloat32:
            return passing<kFull, kMagnitude, F32, kEntries>(scores, cut, start, numel);
        case Dtype::kBFloat16:
            return passing<kFull, kMagnitude, BF16, kEntries>(scores, cut, start, numel);
        default:
            return passing<kFull, kMagnitude, Any, kEntries>(scores, cut, start, numel);
    }
}

// Which of the thread's entries are selected, one bit each.
template <bool kFull, bool kDraws, int kEntries>
__device__ __forceinline__ uint32_t select(const MaskRow& mask, const SeededRule& rule,
                                           const Part<kEntries>& part) {
    uint32_t bits = 0;
    if (mask.form == Form::kNothing) {
        return 0;
    }
    if (mask.form == Form::kBits) {
        const uint8_t* const packed = static_cast<const uint8_t*>(mask.array.data);
#pragma unroll 1
        for (int quarter = 0; quarter < 4; ++quarter) {
            const int64_t first = part.quarter(quarter);
            if constexpr (kFull) {
                const uint32_t found = packed[first / 8] >> (first % 8);
                bits |= (found & ((1u << kEntries) - 1)) << (quarter * kEntries);
            } else {
                for (int i = 0; i < kEntries; ++i) {
                    const int64_t local = first + i;
                    if (local >= 0 && local < mask.numel) {
                        bits |= (packed[local / 8] >> (local % 8) & 1u) << (quarter * kEntries + i);
                    }
                }
            }
        }
        return bits;
    }
    if (mask.form == Form::kScores) {
        const ReadyCut cut(mask.cut_key, mask.last_tie, mask.geometry, mask.numel);
#pragma unroll 1
        for (int quarter = 0; quarter < 4; ++quarter) {
            bits |= passing<kFull, false, kEntries>(mask.array, cut, part.quarter(quarter), mask.numel)
                    << (quarter * kEntries);
        }
        return kFull ? bits : bits & inside(part, mask.numel);
    }
    if constexpr (kDraws) {
        if (mask.form == Form::kSeeded) {
            if constexpr (kFull) {
                draw(part, mask.geometry, rule.seed, rule.draw, mask.key, [&](int entry, uint32_t word) {
                    bits |= static_cast<uint32_t>(is_selected(word, rule.threshold)) << entry;
                });
            } else {
#pragma unroll 1
                for (int entry = 0; entry < 4 * kEntries; ++entry) {
                    const int64_t local = part.quarter(entry / kEntries) + entry % kEntries;
                    if (local >= 0 && local < mask.numel) {
                        const uint32_t word =
                            seeded_word(rule.seed, rule.draw, mask.key,
                                        static_cast<uint64_t>(global_index(local, mask.geometry)));
                        bits |= static_cast<uint32_t>(is_selected(word, rule.threshold)) << entry;
                    }
                }
            }
            return bits;
        }
    }
    return kFull ? ~0u >> (32 - 4 * kEntries) : inside(part, mask.numel);
}

// Whether a tile is full, of a tensor whose arrays are aligned.
__device__ __forceinline__ bool is_full(bool aligned, int64_t tile, int64_t lead, int64_t numel) {
    const int64_t start = tile * kTile - lead;
    return aligned && start >= 0 && start + kTile <= numel;
}

// What a gradient adds to a statistic: nothing where it is not finite.
__device__ __forceinline__ float contribution(Kind kind, float value) {
    value = is_finite(value) ? value : 0.0f;
    return kind == Kind::kSquares  ? value * value
           : kind == Kind::kSigned ? value
                                   : std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0x7FFFFFFF);
}

// Rounds to nearest.
struct ToNearest {
    template <typename Totals>
    __device__ __forceinline__ void operator()(Totals& totals, int i, float value) const {
        totals.set(i, value);
    }
};

// Adds neighbours of a gradient to a statistic; true if one of them was not finite. `within`: those that are
// inside of the tensor. The new statistic stays in `totals`, where `put` rounds it.
template <bool kFull, typename G, typename Totals, int kEntries, typename Put = ToNearest>
__device__ __forceinline__ bool add_to_statistic(const Array& statistic, const Array& grad, Kind kind,
                                                 float scale, int64_t start, int64_t numel, uint32_t within,
                                                 Totals& totals, const Put& put = Put()) {
    Entries<G, float, kEntries> grads;
    grads.template load<kFull>(grad, start, numel);
    totals.template load<kFull>(statistic, start, numel);
    bool spoiled = false;
#pragma unroll
    for (int i = 0; i < kEntries; ++i) {
        const float value = grads.get(i) * scale;
        spoiled |= (within >> i & 1) && !is_finite(value);
        put(totals, i, totals.get(i) + contribution(kind, value));
    }
    totals.template store<kFull>(statistic, start, within);
    return spoiled;
}

// Hands the tensors of a call to `use`, those together that one kernel can work on. Each combination of
// dtypes says which tensors fit; a tensor goes to the first that does.
template <typename Tensor, typename Use, typename... Combinations>
void by_combination(const std::vector<Tensor>& tensors, const Use& use, Combinations... combinations) {
    std::vector<bool> taken(tensors.size());
    const auto take = [&](auto combination) {
        std::vector<size_t> places;
        for (size_t i = 0; i < tensors.size(); ++i) {
            if (!taken[i] && combination.fits(tensors[i])) {
                taken[i] = true;
                places.push_back(i);
            }
        }
        if (!places.empty()) {
            use(combination, places);
        }
    };
    (take(combinations), ...);
}

// Whether an array has the dtype of a tag; one that is not there fits all.
template <typename Tag>
bool fits(const Array& array) {
    if constexpr (std::is_same_v<Tag, Any>) {
        return true;
    } else {
        return array.data == nullptr || array.dtype == Tag::dtype;
    }
}

// How many neighbours of a dtype a thread takes: 16 bytes of them, or 32 of float64, which is rare.
template <typename Tag>
constexpr int kNeighbours = sizeof(typename Tag::Raw) == 2 ? 8 : 4;

// Listed entries: a block has kListed of them, and a thread every kListedThreads-th.
constexpr int kListed = 1024;
constexpr int kListedThreads = 256;

inline int64_t lists_of(int64_t count) {
    return (count + kListed - 1) / kListed;
}

// An index beyond its tensor ends the kernel before anything is read or written there.
__device__ __forceinline__ int64_t index_at(const IndexArray& indices, int64_t i, int64_t numel) {
    const int64_t index = indices.is_64_bit ? static_cast<const int64_t*>(indices.data)[i]
                                            : static_cast<const int32_t*>(indices.data)[i];
    if (index < 0 || index >= numel) {
        __trap();
    }
    return index;
}

}  // namespace sparse_optim::cuda
