// The kernels, included by kernels.cpp once for each level of vector instructions, inside of its namespace.
//
// Plain loops over a block, which the compiler vectorises, and no lambdas: GCC does not compile those for the
// level that the pragma around this file names. Low-precision values are converted into small arrays of T,
// the type of the arithmetic, so that one loop serves every dtype; values that are T already are used where
// they lie.

#define SPARSE_OPTIM_STRING_OF(name) #name
#define SPARSE_OPTIM_STRING(name) SPARSE_OPTIM_STRING_OF(name)

namespace sparse_optim::cpu::SPARSE_OPTIM_LEVEL {
namespace {

// from this many entries in a row on, drawing their whole tile is faster than a call for each
constexpr int64_t kLongRun = 64;

// dtypes

inline char* at(const Array& array, int64_t start) {
    return static_cast<char*>(array.data) + start * bytes_of(array.dtype);
}

template <typename T, typename Stored>
inline void widen(const Stored* __restrict source, int64_t count, T* __restrict values) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] = static_cast<T>(source[i]);
    }
}

template <typename T>
void widen_bfloat16(const uint16_t* __restrict source, int64_t count, T* __restrict values) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] = float_of_bfloat16(source[i]);
    }
}

template <typename T>
void widen_half(const uint16_t* __restrict source, int64_t count, T* __restrict values) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] = float_of_half(source[i]);
    }
}

// The address of `count` stored values as T: theirs, or that of `buffer`, filled.
template <typename T>
T* load(const void* source, Dtype dtype, int64_t count, T* buffer) {
    switch (dtype) {
        case Dtype::kFloat64:
            if constexpr (std::is_same_v<T, double>) {
                return static_cast<T*>(const_cast<void*>(source));
            } else {
                widen(static_cast<const double*>(source), count, buffer);
                return buffer;
            }
        case Dtype::kFloat32:
            if constexpr (std::is_same_v<T, float>) {
                return static_cast<T*>(const_cast<void*>(source));
            } else {
                widen(static_cast<const float*>(source), count, buffer);
                return buffer;
            }
        case Dtype::kBFloat16:
            widen_bfloat16(static_cast<const uint16_t*>(source), count, buffer);
            return buffer;
        case Dtype::kFloat16:
            widen_half(static_cast<const uint16_t*>(source), count, buffer);
            return buffer;
    }
    return buffer;
}

template <typename T>
T* load(const Array& array, int64_t start, int64_t count, T* buffer) {
    return load(at(array, start), array.dtype, count, buffer);
}

template <Dtype kDtype, bool kMasked, typename T, typename Stored>
void narrow(const T* __restrict values, int64_t count, Stored* __restrict target,
            const uint32_t* __restrict selected) {
    for (int64_t i = 0; i < count; ++i) {
        Stored stored;
        if constexpr (kDtype == Dtype::kBFloat16) {
            stored = bfloat16_of(static_cast<float>(values[i]));
        } else if constexpr (kDtype == Dtype::kFloat16) {
            stored = half_of(static_cast<float>(values[i]));
        } else {
            stored = static_cast<Stored>(values[i]);
        }
        // a choice of bits: whatever is not selected, NaNs included, stays as it is
        target[i] = !kMasked || selected[i] ? stored : target[i];
    }
}

template <bool kMasked, typename T>
void store_masked(const T* values, Dtype dtype, int64_t count, void* target, const uint32_t* selected) {
    switch (dtype) {
        case Dtype::kFloat64:
            return narrow<Dtype::kFloat64, kMasked>(values, count, static_cast<double*>(target), selected);
        case Dtype::kFloat32:
            return narrow<Dtype::kFloat32, kMasked>(values, count, static_cast<float*>(target), selected);
        case Dtype::kBFloat16:
            return narrow<Dtype::kBFloat16, kMasked>(values, count, static_cast<uint16_t*>(target), selected);
        case Dtype::kFloat16:
            return narrow<Dtype::kFloat16, kMasked>(values, count, static_cast<uint16_t*>(target), selected);
    }
}

// Writes values back to where `load` found them; nothing to do where they lie there. `selected`: only these.
template <typename T>
void store(const T* values, void* target, Dtype dtype, int64_t count, const uint32_t* selected) {
    if (static_cast<const void*>(values) == target) {
        return;
    }
    if (selected == nullptr) {
        store_masked<false>(values, dtype, count, target, nullptr);
    } else {
        store_masked<true>(values, dtype, count, target, selected);
    }
}

// random words

using Lanes = uint64_t __attribute__((vector_size(SPARSE_OPTIM_VECTOR_BYTES)));
using Words = uint32_t __attribute__((vector_size(SPARSE_OPTIM_VECTOR_BYTES)));
constexpr int kLanes = SPARSE_OPTIM_VECTOR_BYTES / 8;
constexpr uint32_t kMultiplier0 = 0xD2511F53, kMultiplier2 = 0xCD9E8D57;

// The product of the low halves of the lanes.
inline __attribute__((always_inline)) void multiply_low(Lanes& result, const Lanes& a, uint32_t multiplier) {
    const Lanes b = Lanes{} + multiplier;
#if SPARSE_OPTIM_X86 && SPARSE_OPTIM_VECTOR_BYTES == 16
    result =
        reinterpret_cast<Lanes>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#elif SPARSE_OPTIM_X86 && SPARSE_OPTIM_VECTOR_BYTES == 32
    result =
        reinterpret_cast<Lanes>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif SPARSE_OPTIM_X86
    // with a mask of all lanes, because GCC warns of the undefined value in the form without
    result = reinterpret_cast<Lanes>(
        _mm512_maskz_mul_epu32(0xFF, reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#else
    result = (a & 0xFFFFFFFF) * b;
#endif
}

// The low halves of the lanes of two vectors: two of the first, two of the second, and so on.
inline __attribute__((always_inline)) void low_halves(Words& result, const Lanes& a, const Lanes& b) {
#if SPARSE_OPTIM_X86 && SPARSE_OPTIM_VECTOR_BYTES == 16
    result = reinterpret_cast<Words>(
        _mm_shuffle_ps(reinterpret_cast<__m128>(a), reinterpret_cast<__m128>(b), 0x88));
#elif SPARSE_OPTIM_X86 && SPARSE_OPTIM_VECTOR_BYTES == 32
    result = reinterpret_cast<Words>(
        _mm256_shuffle_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), 0x88));
#elif SPARSE_OPTIM_X86
    result = reinterpret_cast<Words>(
        _mm512_maskz_shuffle_ps(0xFFFF, reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), 0x88));
#else
    for (int i = 0; i < kLanes; ++i) {
        result[i / 2 * 4 + i % 2] = static_cast<uint32_t>(a[i]);
        result[i / 2 * 4 + 2 + i % 2] = static_cast<uint32_t>(b[i]);
    }
#endif
}

// Whatever a tile needs that is the same for all its counters. philox.h has the rule; here each word lives in
// the low half of a lane of 64 bits, which is where the vector multiplication wants it, and the high half is
// never read.
struct TileKeys {
    Lanes low[10], high[10];              // the key of each round
    Lanes high_0, low_1, high_1, high_2;  // with the words that are still the same for all counters
};

void prepare_keys(uint64_t seed, uint32_t draw, uint32_t key, uint32_t counter_high, TileKeys& keys) {
    uint32_t low[10], high[10];
    for (uint32_t round = 0; round < 10; ++round) {
        low[round] = static_cast<uint32_t>(seed) + round * 0x9E3779B9u;
        high[round] = static_cast<uint32_t>(seed >> 32) + round * 0xBB67AE85u;
        keys.low[round] = Lanes{} + low[round];
        keys.high[round] = Lanes{} + high[round];
    }
    // draw and key are the same for all: so are two words after the first round, and one after the second
    const uint64_t product_2 = uint64_t{kMultiplier2} * draw;
    const uint32_t word_0 = static_cast<uint32_t>(product_2 >> 32) ^ counter_high ^ low[0];
    const uint32_t word_1 = static_cast<uint32_t>(product_2);
    const uint64_t product_0 = uint64_t{kMultiplier0} * word_0;
    keys.high_0 = Lanes{} + (key ^ high[0]);
    keys.low_1 = Lanes{} + (word_1 ^ low[1]);
    keys.high_1 = Lanes{} + (static_cast<uint32_t>(product_0 >> 32) ^ high[1]);
    keys.high_2 = Lanes{} + (static_cast<uint32_t>(product_0) ^ high[2]);
}

// The four words of the counters first ... first + 2 kLanes - 1. Two vectors take turns, round by round: the
// result of a multiplication is long in coming.
inline __attribute__((always_inline)) void draw_counters(uint32_t first, const TileKeys& keys,
                                                         Words (&words)[4]) {
    Lanes word_0[2], word_1[2], word_2[2], word_3[2], product_0[2], product_2[2], counters[2];
    // in the order that `low_halves` mends
    for (uint32_t i = 0; i < kLanes; ++i) {
        counters[0][i] = i / 2 * 4 + i % 2;
        counters[1][i] = i / 2 * 4 + i % 2 + 2;
    }
    for (int v = 0; v < 2; ++v) {
        multiply_low(product_0[v], counters[v] + first, kMultiplier0);
        word_2[v] = (product_0[v] >> 32) ^ keys.high_0;
        word_3[v] = product_0[v];
    }
    for (int v = 0; v < 2; ++v) {
        multiply_low(product_2[v], word_2[v], kMultiplier2);
        word_0[v] = (product_2[v] >> 32) ^ keys.low_1;
        word_1[v] = product_2[v];
        word_2[v] = word_3[v] ^ keys.high_1;
    }
    for (int v = 0; v < 2; ++v) {
        multiply_low(product_0[v], word_0[v], kMultiplier0);
        multiply_low(product_2[v], word_2[v], kMultiplier2);
        word_0[v] = (product_2[v] >> 32) ^ (word_1[v] ^ keys.low[2]);
        word_1[v] = product_2[v];
        word_2[v] = (product_0[v] >> 32) ^ keys.high_2;
        word_3[v] = product_0[v];
    }
#pragma GCC unroll 7
    for (int round = 3; round < 10; ++round) {
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            multiply_low(product_0[v], word_0[v], kMultiplier0);
            multiply_low(product_2[v], word_2[v], kMultiplier2);
            word_0[v] = (product_2[v] >> 32) ^ (word_1[v] ^ keys.low[round]);
            word_2[v] = (product_0[v] >> 32) ^ (word_3[v] ^ keys.high[round]);
            word_1[v] = product_2[v];
            word_3[v] = product_0[v];
        }
    }
    low_halves(words[0], word_0[0], word_0[1]);
    low_halves(words[1], word_1[0], word_1[1]);
    low_halves(words[2], word_2[0], word_2[1]);
    low_halves(words[3], word_3[0], word_3[1]);
}

// Arrays of which the same entries are needed.
struct Ahead {
    int arrays = 0;
    const char* data[4];
    int64_t bytes[4];

    void add(const Array& array, int64_t start) {
        data[arrays] = at(array, start);
        bytes[arrays++] = bytes_of(array.dtype);
    }
    inline __attribute__((always_inline)) void fetch(int64_t start, int64_t count) const {
        for (int i = 0; i < arrays; ++i) {
            for (int64_t byte = start * bytes[i]; byte < (start + count) * bytes[i]; byte += 64) {
                __builtin_prefetch(data[i] + byte);
            }
        }
    }
};

// The words of a tile, which come in the order of its entries; kMask: whether they are below `limit`, all
// ones or zero.
// `ahead`: a block of entries that is needed next, fetched piece by piece, so that the memory does not idle.
template <bool kMask>
void draw_tile(uint64_t tile, uint64_t seed, uint32_t draw, uint32_t key, uint32_t limit, const Ahead& ahead,
               uint32_t* __restrict result) {
    const uint64_t first = tile * kQuarterEntries;
    TileKeys keys;
    prepare_keys(seed, draw, key, static_cast<uint32_t>(first >> 32), keys);
    for (uint32_t i = 0; i < kQuarterEntries; i += 2 * kLanes) {
        Words words[4];
        draw_counters(static_cast<uint32_t>(first) + i, keys, words);
        ahead.fetch(i * 4, 8 * kLanes);
        for (uint32_t quarter = 0; quarter < 4; ++quarter) {
            if (kMask) {
                words[quarter] = words[quarter] < limit;
            }
            std::memcpy(result + quarter * kQuarterEntries + i, &words[quarter], sizeof(Words));
        }
    }
}

// The words of local entries, in order; kMask: whether they are below `limit`. `tile` is room for one.
template <bool kMask>
void draw_entries(const Geometry& geometry, int64_t start, int64_t count, uint64_t seed, uint32_t draw,
                  uint32_t key, uint32_t limit, const Ahead& ahead, uint32_t* tile, uint32_t* result) {
    for (int64_t done = 0; done < count;) {
        const int64_t row = (start + done) / geometry.inner, column = (start + done) % geometry.inner;
        const uint64_t entry = static_cast<uint64_t>(geometry.offset + row * geometry.stride + column);
        const int64_t within = static_cast<int64_t>(entry % kTileEntries);
        // entries that follow one another, in the global tensor and in this tile
        const int64_t run = std::min({geometry.inner - column, count - done, kBlock - within});
        if (run == kBlock) {
            draw_tile<kMask>(entry / kTileEntries, seed, draw, key, limit, ahead, result + done);
        } else if (run > kLongRun) {
            draw_tile<kMask>(entry / kTileEntries, seed, draw, key, limit, ahead, tile);
            std::memcpy(result + done, tile + within, static_cast<size_t>(run) * sizeof *tile);
        } else {
            for (int64_t i = 0; i < run; ++i) {
                const uint32_t word = seeded_word(seed, draw, key, entry + static_cast<uint64_t>(i));
                result[done + i] = !kMask ? word : word < limit ? ~0u : 0;
            }
        }
        done += run;
    }
}

// sort keys and masks

// Finite scores whose keys, unsigned, lie between two, inclusive: one comparison decides.
struct KeyRange {
    int32_t low = 1, high = 0;

    KeyRange(int64_t low_key, int64_t high_key) {
        // what is not finite lies outside of these
        const int64_t least = int64_t{std::numeric_limits<int32_t>::min()} + 0x800000;
        int64_t from = std::max(low_key - (int64_t{1} << 31), least);
        int64_t to = std::min<int64_t>(high_key - (int64_t{1} << 31), 0x7F7FFFFF);
        from = from == 0 ? -1 : from;
        to = to == -1 ? -2 : to;
        if (from <= to) {
            low = static_cast<int32_t>(from);
            high = static_cast<int32_t>(to);
        }
    }
    bool empty() const { return low > high; }
};

template <bool kMagnitude>
void in_range(const float* __restrict scores, int64_t count, KeyRange range, uint32_t* __restrict selected) {
    if (range.empty()) {
        std::fill(selected, selected + count, 0u);
        return;
    }
    const uint32_t low = static_cast<uint32_t>(range.low), span = static_cast<uint32_t>(range.high) - low;
    for (int64_t i = 0; i < count; ++i) {
        selected[i] = static_cast<uint32_t>(sort_key<kMagnitude>(scores[i])) - low <= span ? ~0u : 0;
    }
}

template <bool kMagnitude>
void above_cut(const Array& array, const Cut& cut, int64_t start, int64_t count, float* buffer,
               uint32_t* selected) {
    const float* scores = load(array, start, count, buffer);
    const int64_t tied = std::clamp<int64_t>(cut.ties - start, 0, count), last = (int64_t{1} << 32) - 1;
    const int shift = low_bits(array.dtype);
    if (tied != 0) {
        in_range<kMagnitude>(scores, tied, KeyRange(cut.key << shift, last), selected);
    }
    if (tied != count) {
        in_range<kMagnitude>(scores + tied, count - tied, KeyRange((cut.key + 1) << shift, last),
                             selected + tied);
    }
}

constexpr uint32_t kBitOf[32] = {1u << 0,  1u << 1,  1u << 2,  1u << 3,  1u << 4,  1u << 5,  1u << 6,
                                 1u << 7,  1u << 8,  1u << 9,  1u << 10, 1u << 11, 1u << 12, 1u << 13,
                                 1u << 14, 1u << 15, 1u << 16, 1u << 17, 1u << 18, 1u << 19, 1u << 20,
                                 1u << 21, 1u << 22, 1u << 23, 1u << 24, 1u << 25, 1u << 26, 1u << 27,
                                 1u << 28, 1u << 29, 1u << 30, 1u << 31};

// 32 bits from any bit on. Masks are padded to whole words, and what lies beyond the last one is not read.
inline uint32_t word_of_bits(const uint8_t* bits, int64_t start, int64_t numel) {
    const int64_t word = start / 32, shift = start % 32;
    uint32_t low = 0, high = 0;
    std::memcpy(&low, bits + word * 4, 4);
    if (shift != 0 && (word + 1) * 32 < numel) {
        std::memcpy(&high, bits + word * 4 + 4, 4);
    }
    return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> shift);
}

void unpack_bits(const uint8_t* bits, int64_t start, int64_t count, int64_t numel,
                 uint32_t* __restrict selected) {
    for (int64_t i = 0; i < count; i += 32) {
        const uint32_t word = word_of_bits(bits, start + i, numel);
        for (int64_t j = 0; j < 32; ++j) {
            selected[i + j] = word & kBitOf[j] ? ~0u : 0;
        }
    }
}

// The highest bits of 32 words.
inline uint32_t pack_32(const uint32_t* selected) {
    uint32_t word = 0;
#if SPARSE_OPTIM_X86 && SPARSE_OPTIM_VECTOR_BYTES >= 32
    for (int i = 0; i < 4; ++i) {
        const __m256 part = _mm256_loadu_ps(reinterpret_cast<const float*>(selected + 8 * i));
        word |= static_cast<uint32_t>(_mm256_movemask_ps(part)) << 8 * i;
    }
#elif SPARSE_OPTIM_X86
    for (int i = 0; i < 8; ++i) {
        const __m128 part = _mm_loadu_ps(reinterpret_cast<const float*>(selected + 4 * i));
        word |= static_cast<uint32_t>(_mm_movemask_ps(part)) << 4 * i;
    }
#else
    for (int i = 0; i < 32; ++i) {
        word |= (selected[i] >> 31) << i;
    }
#endif
    return word;
}

bool any_of(const uint32_t* selected, int64_t count) {
    uint32_t any = 0;
    for (int64_t i = 0; i < count; ++i) {
        any |= selected[i];
    }
    return any != 0;
}

// The positions of what is selected in a block, ascending, and their number. `positions` has room for eight
// more than a block: a fixed number of stores for most words costs less than a loop whose end cannot be
// predicted.
int64_t list_positions(uint32_t* selected, int64_t count, uint32_t* positions) {
    // the later rounds of a selection find something in few blocks
    if (!any_of(selected, count)) {
        return 0;
    }
    std::fill(selected + count, selected + (count + 31) / 32 * 32, 0u);
    int64_t listed = 0;
    for (int64_t first = 0; first < count; first += 32) {
        uint32_t word = pack_32(selected + first);
        const int64_t found = __builtin_popcount(word);
        uint32_t* place = positions + listed;
        for (int i = 0; i < 8; ++i, word &= word - 1) {
            // the highest bit is there for a word without bits, whose position nobody reads
            place[i] = static_cast<uint32_t>(first + __builtin_ctz(word | 1u << 31));
        }
        for (place += 8; word != 0; word &= word - 1) {
            *place++ = static_cast<uint32_t>(first + __builtin_ctz(word));
        }
        listed += found;
    }
    return listed;
}

struct MaskScratch {
    alignas(64) uint32_t tile[kBlock];
    alignas(64) float scores[kBlock];
};

// The mask of a block, all ones or zero, in `selected`, which has room for kBlock entries.
void select(const Mask& mask, const SeededRule& rule, int64_t start, int64_t count, const Ahead& ahead,
            MaskScratch& scratch, uint32_t* selected) {
    switch (mask.form) {
        case Form::kEverything:
            std::fill(selected, selected + count, ~0u);
            return;
        case Form::kNothing:
            std::fill(selected, selected + count, 0u);
            return;
        case Form::kBits:
            unpack_bits(mask.bits, start, count, mask.numel, selected);
            return;
        case Form::kSeeded:
            if (rule.threshold >> 32) {
                std::fill(selected, selected + count, ~0u);
                return;
            }
            draw_entries<true>(mask.geometry, start, count, rule.seed, rule.draw, mask.key,
                               static_cast<uint32_t>(rule.threshold), ahead, scratch.tile, selected);
            return;
        case Form::kScores:
            above_cut<false>(mask.scores, mask.cut, start, count, scratch.scores, selected);
            return;
    }
}

// statistics

// Adds to a statistic; true if a gradient entry was not finite.
template <Kind kKind>
bool accumulate_entries(float* __restrict statistic, const float* __restrict grad, int64_t count,
                        float scale) {
    uint32_t nonfinite = 0;
    for (int64_t i = 0; i < count; ++i) {
        float value = grad[i] * scale;
        const bool finite = is_finite(value);
        nonfinite |= finite ? 0u : 1u;
        value = finite ? value : 0.0f;
        if constexpr (kKind == Kind::kSquares) {
            value = value * value;
        } else if constexpr (kKind == Kind::kAbsolute) {
            value = std::bit_cast<float>(std::bit_cast<uint32_t>(value) & 0x7FFFFFFF);
        }
        statistic[i] = statistic[i] + value;
    }
    return nonfinite != 0;
}

// Adds a block of gradients to a statistic; `values` is room for one, and has the new statistic at the end
// unless it is float32 already. Returns where it lies, still to be stored.
const float* add_block(Kind kind, const Array& statistic, int64_t start, int64_t count, const float* grad,
                       float scale, bool* nonfinite, float* values) {
    float* const total = load(statistic, start, count, values);
    bool found = false;
    switch (kind) {
        case Kind::kSquares:
            found = accumulate_entries<Kind::kSquares>(total, grad, count, scale);
            break;
        case Kind::kSigned:
            found = accumulate_entries<Kind::kSigned>(total, grad, count, scale);
            break;
        case Kind::kAbsolute:
            found = accumulate_entries<Kind::kAbsolute>(total, grad, count, scale);
            break;
    }
    if (found) {
        __atomic_store_n(nonfinite, true, __ATOMIC_RELAXED);
    }
    return total;
}

// The same, stored.
const float* accumulate_block(Kind kind, const Array& statistic, int64_t start, int64_t count,
                              const float* grad, float scale, bool* nonfinite, float* values) {
    const float* const total = add_block(kind, statistic, start, count, grad, scale, nonfinite, values);
    store(total, at(statistic, start), statistic.dtype, count, nullptr);
    return total;
}

// the update

// What happens to the entries that are not selected; kAll: there are none.
enum class Rest { kAll, kZeroGrad, kTrack, kFrozen };

// kByEntry: bias corrections for each entry, else one for all. Gradients are multiplied by `factor`, where
// selected also by `rescale`. See reference.adamw_.
template <bool kAmsgrad, Rest kRest, bool kByEntry, typename T>
void update_entries(const AdamwScalars<T> scalars, const T* __restrict minus_step_sizes,
                    const T* __restrict square_corrections, T factor, T rescale, int64_t count,
                    T* __restrict params, const T* __restrict grads, T* __restrict exp_avgs,
                    T* __restrict exp_avg_sqs, T* __restrict largests, const uint32_t* __restrict selected) {
    constexpr bool kKeepsParam = kRest == Rest::kTrack || kRest == Rest::kFrozen;
    constexpr bool kKeepsState = kRest == Rest::kFrozen;
    const T one_step_size = kByEntry ? T(0) : minus_step_sizes[0];
    const T one_correction = kByEntry ? T(0) : square_corrections[0];
    for (int64_t i = 0; i < count; ++i) {
        T grad = grads[i] * factor;
        if constexpr (kRest == Rest::kTrack) {
            grad = selected[i] ? grad * rescale : grad;
        } else {
            grad = grad * rescale;
        }
        if constexpr (kRest == Rest::kZeroGrad) {
            grad = selected[i] ? grad : T(0);
        }
        T param = params[i], exp_avg = exp_avgs[i], exp_avg_sq = exp_avg_sqs[i];
        T largest = kAmsgrad ? largests[i] : T(0);
        const T step_size = kByEntry ? minus_step_sizes[i] : one_step_size;
        const T correction = kByEntry ? square_corrections[i] : one_correction;
        adamw_entry<kAmsgrad>(param, grad, exp_avg, exp_avg_sq, largest, scalars, step_size, correction);
        // a choice of bits: whatever is not selected, NaNs included, stays as it is
        params[i] = !kKeepsParam || selected[i] ? param : params[i];
        exp_avgs[i] = !kKeepsState || selected[i] ? exp_avg : exp_avgs[i];
        exp_avg_sqs[i] = !kKeepsState || selected[i] ? exp_avg_sq : exp_avg_sqs[i];
        if constexpr (kAmsgrad) {
            largests[i] = !kKeepsState || selected[i] ? largest : largests[i];
        }
    }
}

template <Rest kRest, typename T>
void update_block(const AdamwScalars<T>& scalars, const BiasCorrection<T>& correction, T factor, T rescale,
                  int64_t count, T* params, const T* grads, T* exp_avgs, T* exp_avg_sqs, T* largests,
                  const uint32_t* selected) {
    const T *step_size = &correction.minus_step_size, *square = &correction.square_correction;
    if (largests != nullptr) {
        update_entries<true, kRest, false>(scalars, step_size, square, factor, rescale, count, params, grads,
                                           exp_avgs, exp_avg_sqs, largests, selected);
    } else {
        update_entries<false, kRest, false>(scalars, step_size, square, factor, rescale, count, params, grads,
                                            exp_avgs, exp_avg_sqs, largests, selected);
    }
}

void store_stochastically(const float* __restrict values, const uint32_t* __restrict words, int64_t count,
                          uint16_t* __restrict target, const uint32_t* __restrict selected) {
    for (int64_t i = 0; i < count; ++i) {
        const uint16_t stored = bfloat16_at_random(values[i], words[i]);
        target[i] = selected == nullptr || selected[i] ? stored : target[i];
    }
}

template <typename T>
struct DenseScratch {
    MaskScratch mask;
    alignas(64) uint32_t selected[kBlock];
    alignas(64) uint32_t words[kBlock];
    alignas(64) T grad[kBlock];
    alignas(64) T param[kBlock];
    alignas(64) T exp_avg[kBlock];
    alignas(64) T exp_avg_sq[kBlock];
    alignas(64) T largest[kBlock];
    alignas(64) float statistic_grad[kBlock];
    alignas(64) float statistic[kBlock];
};

template <typename T>
void adamw_block(const DenseCall& call, DenseTensor& tensor, const AdamwScalars<T>& scalars,
                 const BiasCorrection<T>& correction, int64_t start, int64_t count,
                 DenseScratch<T>& scratch) {
    const T* grad = load(tensor.grad, start, count, scratch.grad);
    if (tensor.statistic.data != nullptr) {
        const float* observed;
        if constexpr (std::is_same_v<T, float>) {
            observed = grad;
        } else {
            observed = load(tensor.grad, start, count, scratch.statistic_grad);
        }
        accumulate_block(call.kind, tensor.statistic, start, count, observed,
                         static_cast<float>(tensor.statistic_scale.value), tensor.nonfinite,
                         scratch.statistic);
    }

    const uint32_t* selected = nullptr;
    if (tensor.mask.form != Form::kEverything) {
        Ahead ahead;
        if (count == kBlock) {
            ahead.add(tensor.param, start);
            ahead.add(tensor.grad, start);
            ahead.add(tensor.exp_avg, start);
            ahead.add(tensor.exp_avg_sq, start);
        }
        select(tensor.mask, call.seeded, start, count, ahead, scratch.mask, scratch.selected);
        selected = scratch.selected;
        if (call.unselected == Unselected::kFrozen && !any_of(selected, count)) {
            return;
        }
    }
    const T factor = static_cast<T>(call.hyper.grad_factor), rescale = static_cast<T>(call.rescale);
    T* const param = load(tensor.param, start, count, scratch.param);
    T* const exp_avg = load(tensor.exp_avg, start, count, scratch.exp_avg);
    T* const exp_avg_sq = load(tensor.exp_avg_sq, start, count, scratch.exp_avg_sq);
    T* const largest =
        tensor.largest.data == nullptr ? nullptr : load(tensor.largest, start, count, scratch.largest);
    const uint32_t* const keep_param = call.unselected == Unselected::kZeroGrad ? nullptr : selected;
    const uint32_t* const keep_state = call.unselected == Unselected::kFrozen ? selected : nullptr;
    if (selected == nullptr) {
        update_block<Rest::kAll>(scalars, correction, factor, rescale, count, param, grad, exp_avg,
                                 exp_avg_sq, largest, selected);
    } else if (keep_state != nullptr) {
        update_block<Rest::kFrozen>(scalars, correction, factor, rescale, count, param, grad, exp_avg,
                                    exp_avg_sq, largest, selected);
    } else if (keep_param != nullptr) {
        update_block<Rest::kTrack>(scalars, correction, factor, rescale, count, param, grad, exp_avg,
                                   exp_avg_sq, largest, selected);
    } else {
        update_block<Rest::kZeroGrad>(scalars, correction, factor, rescale, count, param, grad, exp_avg,
                                      exp_avg_sq, largest, selected);
    }
    if constexpr (std::is_same_v<T, float>) {
        if (call.rounds && tensor.param.dtype == Dtype::kBFloat16) {
            draw_entries<false>(tensor.mask.geometry, start, count, call.rounding_seed, call.rounding_draw,
                                tensor.rounding_key, 0, Ahead(), scratch.mask.tile, scratch.words);
            store_stochastically(param, scratch.words, count,
                                 reinterpret_cast<uint16_t*>(at(tensor.param, start)), keep_param);
        } else {
            store(param, at(tensor.param, start), tensor.param.dtype, count, keep_param);
        }
    } else {
        store(param, at(tensor.param, start), tensor.param.dtype, count, keep_param);
    }
    store(exp_avg, at(tensor.exp_avg, start), tensor.exp_avg.dtype, count, keep_state);
    store(exp_avg_sq, at(tensor.exp_avg_sq, start), tensor.exp_avg_sq.dtype, count, keep_state);
    if (largest != nullptr) {
        store(largest, at(tensor.largest, start), tensor.largest.dtype, count, keep_state);
    }
}

// The local entries of a block, where the first block of a tensor is shorter by `lead`.
struct Span {
    int64_t start, count;
};

inline Span span_of(int64_t block, int64_t lead, int64_t numel) {
    const int64_t start = std::max<int64_t>(block * kBlock - lead, 0);
    return {start, std::min((block + 1) * kBlock - lead, numel) - start};
}

template <typename T>
void adamw_blocks(DenseCall& call, int64_t index, int64_t begin, int64_t end) {
    DenseTensor& tensor = call.tensors[static_cast<size_t>(index)];
    const Hyperparameters& h = call.hyper;
    const auto scalars = adamw_scalars<T>(h.lr, h.beta1, h.beta2, h.eps, h.weight_decay);
    const auto correction = bias_correction<T>(h.lr, h.beta1, h.beta2, tensor.step.value);
    DenseScratch<T> scratch;
    for (int64_t block = begin; block < end; ++block) {
        const Span span = span_of(block - call.blocks.first(index), tensor.lead, tensor.mask.numel);
        adamw_block(call, tensor, scalars, correction, span.start, span.count, scratch);
    }
}

void adamw(DenseCall& call, int64_t begin, int64_t end) {
    for (int64_t index = call.blocks.tensor_of(begin); begin < end; ++index) {
        const int64_t last = std::min(end, call.blocks.first(index + 1));
        if (begin < last) {
            const bool wide = call.tensors[static_cast<size_t>(index)].param.dtype == Dtype::kFloat64;
            wide ? adamw_blocks<double>(call, index, begin, last)
                 : adamw_blocks<float>(call, index, begin, last);
        }
        begin = last;
    }
}

// listed entries

// entries that are fetched early; 1 % of 27 million took 3.1 and 3.0 ms on two cores with 16 and 64, 4.7 ms
// with none
constexpr int64_t kAhead = 64;
// entries between neighbours from which on that pays; at 10 %, where it does not, it took 19.8 instead of
// 18.9 ms
constexpr int64_t kSparse = 32;
// entries that are updated at a time, so that the lines they lie in are still near when they are written; 10
// and 30 % of 27 million took 14.9 and 16.1 ms on one core, and 22.2 and 29.0 ms with whole blocks, which
// suit 1 %
constexpr int64_t kTogether = 128;

template <typename Index>
bool any_outside(const Index* __restrict indices, int64_t count, int64_t numel) {
    // as unsigned numbers, negative ones are large
    using Unsigned = std::make_unsigned_t<Index>;
    Unsigned largest = 0;
    for (int64_t i = 0; i < count; ++i) {
        largest = std::max(largest, static_cast<Unsigned>(indices[i]));
    }
    return static_cast<uint64_t>(largest) >= static_cast<uint64_t>(numel);
}

// Where indices lie far apart, the lines of those that come are fetched early, for writing where kWrite.
// `known`: how many indices there are from here on to the end of the list; 0 fetches nothing, because the
// hardware sees by itself that the next line is needed.
template <bool kWrite, typename Raw, typename Index>
void take(const void* source, const Index* __restrict indices, int64_t count, int64_t known,
          void* __restrict target) {
    const Raw* const from = static_cast<const Raw*>(source);
    Raw* const to = static_cast<Raw*>(target);
    const int64_t fetched = std::min(count, known - kAhead);
    int64_t i = 0;
    for (; i < fetched; ++i) {
        __builtin_prefetch(from + indices[i + kAhead], kWrite);
        to[i] = from[indices[i]];
    }
#pragma GCC unroll 8
    for (; i < count; ++i) {
        to[i] = from[indices[i]];
    }
}

inline bool is_sparse(const IndexArray& indices, int64_t numel) {
    return numel / kSparse > indices.count;
}

// `known` for `take`.
inline int64_t known_if_sparse(const IndexArray& indices, int64_t start, int64_t numel) {
    return is_sparse(indices, numel) ? indices.count - start : 0;
}

template <typename Raw, typename Index>
void put(const void* __restrict source, const Index* __restrict indices, int64_t count, void* target) {
    const Raw* const from = static_cast<const Raw*>(source);
    Raw* const to = static_cast<Raw*>(target);
#pragma GCC unroll 8
    for (int64_t i = 0; i < count; ++i) {
        to[indices[i]] = from[i];
    }
}

template <bool kWrite, typename Index>
void take(const Array& array, const Index* indices, int64_t count, int64_t known, void* raw) {
    switch (bytes_of(array.dtype)) {
        case 2:
            return take<kWrite, uint16_t>(array.data, indices, count, known, raw);
        case 4:
            return take<kWrite, uint32_t>(array.data, indices, count, known, raw);
        default:
            return take<kWrite, uint64_t>(array.data, indices, count, known, raw);
    }
}

template <typename Index>
void put(const Array& array, const Index* indices, int64_t count, const void* raw) {
    switch (bytes_of(array.dtype)) {
        case 2:
            return put<uint16_t>(raw, indices, count, array.data);
        case 4:
            return put<uint32_t>(raw, indices, count, array.data);
        default:
            return put<uint64_t>(raw, indices, count, array.data);
    }
}

template <typename T>
struct IndexedScratch {
    alignas(64) T raw_param[kBlock];
    alignas(64) T raw_grad[kBlock];
    alignas(64) T raw_master[kBlock];
    alignas(64) T param[kBlock];
    alignas(64) T grad[kBlock];
    alignas(64) T exp_avg[kBlock];
    alignas(64) T exp_avg_sq[kBlock];
    alignas(64) T largest[kBlock];
    alignas(64) T rounded[kBlock];
    alignas(64) T step_sizes[kBlock];
    alignas(64) T square_corrections[kBlock];
};

// Bias corrections by age. Entries come in cohorts, so that few different ages occur at a time.
template <typename T>
struct Cohorts {
    static constexpr int32_t kSlots = 64;
    int32_t age[kSlots] = {1};  // none yet: each slot starts with an age that belongs into another
    BiasCorrection<T> correction[kSlots];

    const BiasCorrection<T>& of(int32_t wanted, const Hyperparameters& h) {
        const int32_t slot = wanted & (kSlots - 1);
        if (age[slot] != wanted) {
            age[slot] = wanted;
            correction[slot] = bias_correction<T>(h.lr, h.beta1, h.beta2, wanted);
        }
        return correction[slot];
    }
};

// A parameter that is no longer its rounded master was written by somebody else: the master restarts there.
template <typename T>
void refresh_masters(T* __restrict masters, const T* __restrict stored, const T* __restrict rounded,
                     int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        masters[i] = rounded[i] == stored[i] ? masters[i] : stored[i];
    }
}

template <typename T, typename Index>
void adamw_indexed_block(IndexedCall& call, IndexedTensor& tensor, const AdamwScalars<T>& scalars,
                         const BiasCorrection<T>& correction, Cohorts<T>& cohorts, int64_t start,
                         int64_t count, IndexedScratch<T>& scratch) {
    const Index* const indices = static_cast<const Index*>(tensor.indices.data) + start;
    const int64_t known = known_if_sparse(tensor.indices, start, tensor.numel);
    // those that are fetched early are addresses too, but a prefetch of any address is harmless
    if (any_outside(indices, count, tensor.numel)) {
        call.bad_index.store(true, std::memory_order_relaxed);
        return;
    }
    take<true>(tensor.param, indices, count, known, scratch.raw_param);
    const T* grad;
    if (call.compact_grads) {
        grad = load(tensor.grad, start, count, scratch.grad);
    } else if (bytes_of(tensor.grad.dtype) <= static_cast<int64_t>(sizeof(T))) {
        take<false>(tensor.grad, indices, count, known, scratch.raw_grad);
        grad = load(scratch.raw_grad, tensor.grad.dtype, count, scratch.grad);
    } else {
        // float64 gradients of narrower parameters
        const double* const wide = static_cast<const double*>(tensor.grad.data);
        for (int64_t i = 0; i < count; ++i) {
            scratch.grad[i] = static_cast<T>(wide[indices[i]]);
        }
        grad = scratch.grad;
    }
    const Dtype dtype = tensor.param.dtype;
    T* value = load(scratch.raw_param, dtype, count, scratch.param);
    if (tensor.master.data != nullptr) {
        T* const master = static_cast<T*>(tensor.master.data) + start;
        const T* rounded = master;
        if (value != scratch.raw_param) {
            store_masked<false>(master, dtype, count, scratch.raw_master, nullptr);
            rounded = load(scratch.raw_master, dtype, count, scratch.rounded);
        }
        std::copy(rounded, rounded + count, scratch.rounded);
        refresh_masters(master, value, scratch.rounded, count);
        value = master;
    }
    T* const exp_avg = load(tensor.exp_avg, start, count, scratch.exp_avg);
    T* const exp_avg_sq = load(tensor.exp_avg_sq, start, count, scratch.exp_avg_sq);
    T* const largest =
        tensor.largest.data == nullptr ? nullptr : load(tensor.largest, start, count, scratch.largest);
    const T factor = static_cast<T>(call.hyper.grad_factor), one = T(1);
    if (tensor.ages == nullptr) {
        update_block<Rest::kAll>(scalars, correction, factor, one, count, value, grad, exp_avg, exp_avg_sq,
                                 largest, nullptr);
    } else {
        for (int64_t i = 0; i < count; ++i) {
            int32_t& age = tensor.ages[start + i];
            age = static_cast<int32_t>(static_cast<uint32_t>(age) + 1);  // the largest wraps, as in torch
            const BiasCorrection<T>& own = cohorts.of(age, call.hyper);
            scratch.step_sizes[i] = own.minus_step_size;
            scratch.square_corrections[i] = own.square_correction;
        }
        if (largest != nullptr) {
            update_entries<true, Rest::kAll, true>(scalars, scratch.step_sizes, scratch.square_corrections,
                                                   factor, one, count, value, grad, exp_avg, exp_avg_sq,
                                                   largest, nullptr);
        } else {
            update_entries<false, Rest::kAll, true>(scalars, scratch.step_sizes, scratch.square_corrections,
                                                    factor, one, count, value, grad, exp_avg, exp_avg_sq,
                                                    largest, nullptr);
        }
    }
    if (value != scratch.raw_param) {
        store_masked<false>(value, dtype, count, scratch.raw_param, nullptr);
    }
    put(tensor.param, indices, count, scratch.raw_param);
    store(exp_avg, at(tensor.exp_avg, start), tensor.exp_avg.dtype, count, nullptr);
    store(exp_avg_sq, at(tensor.exp_avg_sq, start), tensor.exp_avg_sq.dtype, count, nullptr);
    if (largest != nullptr) {
        store(largest, at(tensor.largest, start), tensor.largest.dtype, count, nullptr);
    }
}

template <typename T>
void adamw_indexed_blocks(IndexedCall& call, int64_t index, int64_t begin, int64_t end) {
    IndexedTensor& tensor = call.tensors[static_cast<size_t>(index)];
    const Hyperparameters& h = call.hyper;
    const auto scalars = adamw_scalars<T>(h.lr, h.beta1, h.beta2, h.eps, h.weight_decay);
    const auto correction = bias_correction<T>(h.lr, h.beta1, h.beta2, tensor.step.value);
    const int64_t together = is_sparse(tensor.indices, tensor.numel) ? kBlock : kTogether;
    Cohorts<T> cohorts;
    IndexedScratch<T> scratch;
    for (int64_t block = begin; block < end; ++block) {
        const Span span = span_of(block - call.blocks.first(index), 0, tensor.indices.count);
        for (int64_t done = 0; done < span.count; done += together) {
            const int64_t start = span.start + done, count = std::min(span.count - done, together);
            if (tensor.indices.is_64_bit) {
                adamw_indexed_block<T, int64_t>(call, tensor, scalars, correction, cohorts, start, count,
                                                scratch);
            } else {
                adamw_indexed_block<T, int32_t>(call, tensor, scalars, correction, cohorts, start, count,
                                                scratch);
            }
        }
    }
}

void adamw_indexed(IndexedCall& call, int64_t begin, int64_t end) {
    for (int64_t index = call.blocks.tensor_of(begin); begin < end; ++index) {
        const int64_t last = std::min(end, call.blocks.first(index + 1));
        if (begin < last) {
            const bool wide = call.tensors[static_cast<size_t>(index)].param.dtype == Dtype::kFloat64;
            wide ? adamw_indexed_blocks<double>(call, index, begin, last)
                 : adamw_indexed_blocks<float>(call, index, begin, last);
        }
        begin = last;
    }
}

// Takes the listed entries, as T. False: an index lies outside. `raw` and `buffer` have room for a block.
template <typename T, typename Index>
const T* take_as(const Array& array, const Index* indices, int64_t count, int64_t known, uint64_t* raw,
                 T* buffer) {
    take<false>(array, indices, count, known, raw);
    return load(raw, array.dtype, count, buffer);
}

template <typename T, typename Index>
bool gather_block(const GatherTensor& tensor, int64_t start, int64_t count) {
    const Index* const indices = static_cast<const Index*>(tensor.indices.data) + start;
    if (any_outside(indices, count, tensor.numel)) {
        return false;
    }
    alignas(64) uint64_t raw[kBlock];
    alignas(64) T values[kBlock];
    const T* const taken = take_as(tensor.tensor, indices, count,
                                   known_if_sparse(tensor.indices, start, tensor.numel), raw, values);
    T* const buffer = static_cast<T*>(tensor.buffer.data) + start;
    for (int64_t i = 0; i < count; ++i) {
        buffer[i] = buffer[i] + taken[i];
    }
    return true;
}

void gather(GatherCall& call, int64_t begin, int64_t end) {
    for (int64_t block = begin, index = call.blocks.tensor_of(begin); block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        const GatherTensor& tensor = call.tensors[static_cast<size_t>(index)];
        const Span span = span_of(block - call.blocks.first(index), 0, tensor.indices.count);
        const bool wide = tensor.buffer.dtype == Dtype::kFloat64, is_64_bit = tensor.indices.is_64_bit;
        const bool fine = wide ? (is_64_bit ? gather_block<double, int64_t>(tensor, span.start, span.count)
                                            : gather_block<double, int32_t>(tensor, span.start, span.count))
                               : (is_64_bit ? gather_block<float, int64_t>(tensor, span.start, span.count)
                                            : gather_block<float, int32_t>(tensor, span.start, span.count));
        if (!fine) {
            call.bad_index.store(true, std::memory_order_relaxed);
        }
    }
}

template <typename T>
void add_entries(T* __restrict values, const T* __restrict added, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        values[i] = values[i] + added[i];
    }
}

// The sums, rounded into the stored dtype, in `raw`.
template <typename T>
void add_stored(const Array& values, int64_t start, int64_t count, uint64_t* raw) {
    alignas(64) T old_values[kBlock], added_values[kBlock];
    T* const sums = load(raw, values.dtype, count, old_values);
    add_entries(sums, load(values, start, count, added_values), count);
    store(sums, raw, values.dtype, count, nullptr);
}

template <typename Index>
bool apply_delta_block(const DeltaTensor& tensor, Mode mode, int64_t start, int64_t count) {
    const Index* const indices = static_cast<const Index*>(tensor.indices.data) + start;
    if (any_outside(indices, count, tensor.numel)) {
        return false;
    }
    const char* const values = at(tensor.values, start);
    if (mode == Mode::kReplace) {
        put(tensor.param, indices, count, values);
        return true;
    }
    alignas(64) uint64_t raw[kBlock];
    take<true>(tensor.param, indices, count, known_if_sparse(tensor.indices, start, tensor.numel), raw);
    if (mode == Mode::kXor) {
        char* const bytes = reinterpret_cast<char*>(raw);
        for (int64_t i = 0; i < count * bytes_of(tensor.param.dtype); ++i) {
            bytes[i] = static_cast<char>(bytes[i] ^ values[i]);
        }
    } else if (tensor.param.dtype == Dtype::kFloat64) {
        add_stored<double>(tensor.values, start, count, raw);
    } else {
        add_stored<float>(tensor.values, start, count, raw);
    }
    put(tensor.param, indices, count, raw);
    return true;
}

void apply_delta(DeltaCall& call, int64_t begin, int64_t end) {
    for (int64_t block = begin, index = call.blocks.tensor_of(begin); block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        const DeltaTensor& tensor = call.tensors[static_cast<size_t>(index)];
        const Span span = span_of(block - call.blocks.first(index), 0, tensor.indices.count);
        const bool fine = tensor.indices.is_64_bit
                              ? apply_delta_block<int64_t>(tensor, call.mode, span.start, span.count)
                              : apply_delta_block<int32_t>(tensor, call.mode, span.start, span.count);
        if (!fine) {
            call.bad_index.store(true, std::memory_order_relaxed);
        }
    }
}

// exact selection

constexpr int kMostBins = 1 << 11;

// Counts of one thread, four times over: an increment that finds its bin still on the way to memory would
// wait, and gradients fall into few bins.
struct Bins {
    alignas(64) uint32_t counts[4][kMostBins];
    int64_t* target;
    int64_t counted;
    int bins;
    bool drops_ends;  // the bins of what is not finite

    void start(int64_t* row, int width, bool drops) {
        target = row;
        counted = 0;
        bins = 1 << width;
        drops_ends = drops;
        std::memset(counts, 0, sizeof counts);
    }

    void flush() {
        const int ends = drops_ends ? 4 : 0;
        for (int i = ends; i < bins - ends; ++i) {
            const int64_t sum = int64_t{counts[0][i]} + counts[1][i] + counts[2][i] + counts[3][i];
            if (sum != 0) {
                __atomic_fetch_add(target + i, sum, __ATOMIC_RELAXED);
            }
        }
    }

    // before work on a block whose counts go to `row`
    void turn_to(int64_t* row, int width, bool drops) {
        // below 2^31 counts no bin overflows
        if (row != target || drops != drops_ends || counted > int64_t{1} << 31) {
            flush();
            start(row, width, drops);
        }
        counted += kBlock;
    }
};

constexpr int kFirstShift = 32 - 11;

template <bool kMagnitude>
void bins_of(const float* __restrict scores, int64_t count, uint32_t* __restrict places) {
    for (int64_t i = 0; i < count; ++i) {
        const int32_t key = sort_key<kMagnitude>(without_negative_zero(scores[i]));
        places[i] = (static_cast<uint32_t>(key) ^ 0x80000000u) >> kFirstShift;
    }
}

// Counts by the first 11 bits: sign, exponent and two bits more, so that what is not finite has bins of its
// own, the first four and the last four.
template <bool kMagnitude>
void count_first_bits(const float* scores, int64_t count, Bins& bins) {
    alignas(64) uint32_t places[kBlock];
    bins_of<kMagnitude>(scores, count, places);
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) {
        uint64_t two, other;
        std::memcpy(&two, places + i, 8);
        std::memcpy(&other, places + i + 2, 8);
        ++bins.counts[0][two & 0xFFFFFFFF];
        ++bins.counts[1][two >> 32];
        ++bins.counts[2][other & 0xFFFFFFFF];
        ++bins.counts[3][other >> 32];
    }
    for (; i < count; ++i) {
        ++bins.counts[0][places[i]];
    }
}

inline bool counts_first_bits(const HistogramCall& call, const HistogramTensor& tensor) {
    return call.shift + low_bits(tensor.scores.dtype) == kFirstShift && call.width == 11 && !call.among_ties;
}

template <bool kMagnitude>
void histogram_block(const HistogramCall& call, const HistogramTensor& tensor, int64_t start, int64_t count,
                     float* buffer, Bins& bins) {
    const float* const scores = load(tensor.scores, start, count, buffer);
    if (counts_first_bits(call, tensor)) {
        if (*tensor.prefix == 0) {
            count_first_bits<kMagnitude>(scores, count, bins);
        }
        return;
    }
    // a shift by 32 or more leaves nothing of a key, and one by 64 is undefined
    const int low = low_bits(tensor.scores.dtype), shift = std::min(call.shift + low, 63);
    const int above = call.among_ties ? low : std::min(shift + call.width, 32);
    const int64_t wanted = call.among_ties ? *tensor.tie : *tensor.prefix;
    if (wanted < 0 || wanted >> (32 - above) != 0) {
        return;
    }
    alignas(64) uint32_t matches[kBlock];
    in_range<kMagnitude>(scores, count, KeyRange(wanted << above, ((wanted + 1) << above) - 1), matches);
    alignas(64) uint32_t positions[kBlock + 8];
    const int64_t found = list_positions(matches, count, positions);
    const uint64_t last = static_cast<uint64_t>(bins.bins) - 1;
    // lower bits differ from entry to entry: one set of counts, which stays in the nearest cache, is faster
    // here
    if (!call.among_ties) {
        for (int64_t i = 0; i < found; ++i) {
            const int32_t key = sort_key<kMagnitude>(without_negative_zero(scores[positions[i]]));
            const uint64_t digits = uint64_t{static_cast<uint32_t>(key) ^ 0x80000000u} >> shift;
            ++bins.counts[0][digits & last];
        }
        return;
    }
    const Geometry& geometry = tensor.geometry;
    for (int64_t i = 0; i < found; ++i) {
        const int64_t global = global_index(start + positions[i], geometry);
        if (global >> (call.shift + call.width) == *tensor.prefix) {
            ++bins.counts[0][static_cast<uint64_t>(global >> call.shift) & last];
        }
    }
}

void histogram(HistogramCall& call, int64_t begin, int64_t end) {
    alignas(64) float buffer[kBlock];
    Bins bins;
    int64_t index = call.blocks.tensor_of(begin);
    const HistogramTensor& first = call.tensors[static_cast<size_t>(index)];
    bins.start(first.counts, call.width, counts_first_bits(call, first));
    for (int64_t block = begin; block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        const HistogramTensor& tensor = call.tensors[static_cast<size_t>(index)];
        const Span span = span_of(block - call.blocks.first(index), 0, tensor.numel);
        bins.turn_to(tensor.counts, call.width, counts_first_bits(call, tensor));
        call.absolute ? histogram_block<true>(call, tensor, span.start, span.count, buffer, bins)
                      : histogram_block<false>(call, tensor, span.start, span.count, buffer, bins);
    }
    bins.flush();
}

// `accumulate_block` of a bfloat16 statistic that is rounded stochastically.
const float* accumulate_rounded_block(const AccumulateCall& call, const AccumulateTensor& tensor,
                                      const Span& span, float* grads, float* totals) {
    alignas(64) uint32_t words[kBlock], tile[kBlock];
    Ahead ahead;
    if (span.count == kBlock) {
        ahead.add(tensor.statistic, span.start);
        ahead.add(tensor.grad, span.start);
    }
    draw_entries<false>(tensor.geometry, span.start, span.count, call.rounding_seed, call.rounding_draw,
                        tensor.rounding_key, 0, ahead, tile, words);
    const float* const grad = load(tensor.grad, span.start, span.count, grads);
    const float* const total = add_block(call.kind, tensor.statistic, span.start, span.count, grad,
                                         static_cast<float>(tensor.scale.value), tensor.nonfinite, totals);
    store_stochastically(total, words, span.count,
                         reinterpret_cast<uint16_t*>(at(tensor.statistic, span.start)), nullptr);
    return total;
}

void accumulate(AccumulateCall& call, int64_t begin, int64_t end) {
    alignas(64) float grads[kBlock], totals[kBlock];
    Bins bins;
    int64_t index = call.blocks.tensor_of(begin);
    const bool counts = call.tensors[static_cast<size_t>(index)].counts != nullptr;
    if (counts) {
        bins.start(call.tensors[static_cast<size_t>(index)].counts, 11, true);
    }
    for (int64_t block = begin; block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        AccumulateTensor& tensor = call.tensors[static_cast<size_t>(index)];
        const Span span = span_of(block - call.blocks.first(index), tensor.lead, tensor.numel);
        const float* statistic;
        if (tensor.rounds) {
            statistic = accumulate_rounded_block(call, tensor, span, grads, totals);
        } else {
            const float* const grad = load(tensor.grad, span.start, span.count, grads);
            statistic = accumulate_block(call.kind, tensor.statistic, span.start, span.count, grad,
                                         static_cast<float>(tensor.scale.value), tensor.nonfinite, totals);
        }
        if (!counts) {
            continue;
        }
        if (statistic == totals) {
            // what was stored, not what was rounded
            statistic = load(tensor.statistic, span.start, span.count, totals);
        }
        bins.turn_to(tensor.counts, 11, true);
        call.absolute ? count_first_bits<true>(statistic, span.count, bins)
                      : count_first_bits<false>(statistic, span.count, bins);
    }
    if (counts) {
        bins.flush();
    }
}

void mask_of(const CompactCall& call, const Mask& mask, const Span& span, float* buffer, uint32_t* selected) {
    call.absolute ? above_cut<true>(mask.scores, mask.cut, span.start, span.count, buffer, selected)
                  : above_cut<false>(mask.scores, mask.cut, span.start, span.count, buffer, selected);
}

void count_selected(CompactCall& call, int64_t begin, int64_t end) {
    alignas(64) float buffer[kBlock];
    alignas(64) uint32_t selected[kBlock];
    for (int64_t block = begin, index = call.blocks.tensor_of(begin); block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        const Mask& mask = call.tensors[static_cast<size_t>(index)].mask;
        const Span span = span_of(block - call.blocks.first(index), 0, mask.numel);
        mask_of(call, mask, span, buffer, selected);
        int32_t count = 0;
        for (int64_t i = 0; i < span.count; ++i) {
            count -= static_cast<int32_t>(selected[i]);  // all ones is -1
        }
        call.places[block] = count;
    }
}

template <typename Index>
void put_indices(const uint32_t* __restrict positions, int64_t count, int64_t first, void* indices,
                 int64_t place) {
    Index* __restrict const target = static_cast<Index*>(indices) + place;
    for (int64_t i = 0; i < count; ++i) {
        target[i] = static_cast<Index>(first) + static_cast<Index>(positions[i]);
    }
}

void put_bits(const uint32_t* selected, int64_t count, uint8_t* bits) {
    for (int64_t first = 0; first < count; first += 32) {
        const uint32_t word = pack_32(selected + first);
        std::memcpy(bits + first / 8, &word, sizeof word);
    }
}

void compact(CompactCall& call, int64_t begin, int64_t end) {
    alignas(64) float buffer[kBlock];
    alignas(64) uint32_t selected[kBlock];
    for (int64_t block = begin, index = call.blocks.tensor_of(begin); block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        const CompactTensor& tensor = call.tensors[static_cast<size_t>(index)];
        const Span span = span_of(block - call.blocks.first(index), 0, tensor.mask.numel);
        mask_of(call, tensor.mask, span, buffer, selected);
        if (tensor.bits != nullptr) {
            std::fill(selected + span.count, selected + (span.count + 31) / 32 * 32, 0u);
            put_bits(selected, span.count, tensor.bits + span.start / 8);
            continue;
        }
        alignas(64) uint32_t positions[kBlock + 8];
        const int64_t found = list_positions(selected, span.count, positions);
        const int64_t place = call.places[block];
        tensor.is_64_bit ? put_indices<int64_t>(positions, found, span.start, tensor.indices, place)
                         : put_indices<int32_t>(positions, found, span.start, tensor.indices, place);
    }
}

// norms

constexpr int64_t kSums = 16;

// In sixteen partial sums, whatever the width of a vector.
double sum_of_squares(const double* __restrict values, int64_t count) {
    double sums[kSums] = {};
    int64_t i = 0;
    for (; i + kSums <= count; i += kSums) {
        for (int64_t j = 0; j < kSums; ++j) {
            sums[j] += values[i + j] * values[i + j];
        }
    }
    for (int64_t j = 0; i + j < count; ++j) {
        sums[j] += values[i + j] * values[i + j];
    }
    double total = 0;
    for (int64_t j = 0; j < kSums; ++j) {
        total += sums[j];
    }
    return total;
}

struct NormScratch {
    MaskScratch mask;
    alignas(64) uint32_t selected[kBlock];
    alignas(64) uint64_t raw[kBlock];
    alignas(64) double values[kBlock];
    alignas(64) double kept[kBlock];
};

template <typename Index>
double norm_of_listed(NormCall& call, const NormTensor& tensor, int64_t start, int64_t count,
                      NormScratch& scratch) {
    const Index* const indices = static_cast<const Index*>(tensor.indices.data) + start;
    if (any_outside(indices, count, tensor.mask.numel)) {
        call.bad_index.store(true, std::memory_order_relaxed);
        return 0;
    }
    const int64_t known = known_if_sparse(tensor.indices, start, tensor.mask.numel);
    return sum_of_squares(take_as(tensor.grad, indices, count, known, scratch.raw, scratch.values), count);
}

double norm_of_selected(const NormCall& call, const NormTensor& tensor, int64_t start, int64_t count,
                        NormScratch& scratch) {
    const double* values = load(tensor.grad, start, count, scratch.values);
    if (tensor.mask.form != Form::kEverything) {
        select(tensor.mask, call.seeded, start, count, Ahead(), scratch.mask, scratch.selected);
        for (int64_t i = 0; i < count; ++i) {
            scratch.kept[i] = scratch.selected[i] ? values[i] : 0.0;
        }
        values = scratch.kept;
    }
    return sum_of_squares(values, count);
}

void norm(NormCall& call, int64_t begin, int64_t end) {
    NormScratch scratch;
    for (int64_t block = begin, index = call.blocks.tensor_of(begin); block < end; ++block) {
        while (block >= call.blocks.first(index + 1)) {
            ++index;
        }
        const NormTensor& tensor = call.tensors[static_cast<size_t>(index)];
        const int64_t number = block - call.blocks.first(index);
        double sum;
        if (call.indexed) {
            const Span span = span_of(number, 0, tensor.indices.count);
            sum = tensor.indices.is_64_bit
                      ? norm_of_listed<int64_t>(call, tensor, span.start, span.count, scratch)
                      : norm_of_listed<int32_t>(call, tensor, span.start, span.count, scratch);
        } else {
            const Span span = span_of(number, tensor.lead, tensor.mask.numel);
            sum = norm_of_selected(call, tensor, span.start, span.count, scratch);
        }
        call.sums[block] = sum;
    }
}

}  // namespace

constexpr Kernels table = {SPARSE_OPTIM_STRING(SPARSE_OPTIM_LEVEL),
                           adamw,
                           adamw_indexed,
                           gather,
                           apply_delta,
                           accumulate,
                           histogram,
                           count_selected,
                           compact,
                           norm};

}  // namespace sparse_optim::cpu::SPARSE_OPTIM_LEVEL

#undef SPARSE_OPTIM_STRING_OF
#undef SPARSE_OPTIM_STRING
