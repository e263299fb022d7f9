// Statistics, exact selection and norms on the GPU.

#include "entries.cuh"

namespace sparse_optim::cuda {
namespace {

// Blocks that count keep their bins over a run of tiles, since every block has to add them up in the end: so
// many that each multiprocessor of a large GPU has eight.
constexpr int64_t kCountingBlocks = 1056;
constexpr int kMostBins = 1 << 11;
constexpr int kFirstShift = 32 - 11;
// Neighbouring threads count in different copies: gradients fall into few bins, and threads that count in the
// same place wait for one another.
constexpr int kCopies = 4;

using Bins = uint32_t[kMostBins * kCopies];

__device__ __forceinline__ void clear(Bins& bins) {
    for (uint32_t i = threadIdx.x; i < kMostBins * kCopies; i += blockDim.x) {
        bins[i] = 0;
    }
    __syncthreads();
}

__device__ __forceinline__ void count_in(Bins& bins, uint32_t bin) {
    atomicAdd(&bins[bin * kCopies + threadIdx.x % kCopies], 1u);
}

__device__ __forceinline__ void add_up(const Bins& bins, int64_t* counts, int width) {
    __syncthreads();
    for (uint32_t bin = threadIdx.x; bin < 1u << width; bin += blockDim.x) {
        uint64_t sum = 0;
        for (int copy = 0; copy < kCopies; ++copy) {
            sum += bins[bin * kCopies + copy];
        }
        if (sum != 0) {
            atomicAdd(reinterpret_cast<unsigned long long*>(counts + bin),
                      static_cast<unsigned long long>(sum));
        }
    }
}

template <bool kMagnitude>
__device__ __forceinline__ uint32_t unsigned_key(float score) {
    return static_cast<uint32_t>(sort_key<kMagnitude>(without_negative_zero(score))) ^ 0x80000000u;
}

// How many tiles a block takes, one after the other.
template <typename Row>
int64_t run_of(const std::vector<Row>& rows) {
    int64_t tiles = 0;
    for (const Row& row : rows) {
        tiles += tiles_of(row.numel, row.lead);
    }
    return std::max<int64_t>((tiles + kCountingBlocks - 1) / kCountingBlocks, 1);
}

template <typename Row>
int64_t runs_of(const Row& row, int64_t run) {
    return (tiles_of(row.numel, row.lead) + run - 1) / run;
}

// statistics

struct StatisticRow {
    static constexpr int64_t lead = 0;
    int64_t numel;
    Array statistic, grad;
    Number scale;
    bool* nonfinite;
    int64_t* counts;
    bool aligned;
};

// of a bfloat16 statistic that is rounded stochastically
struct RoundedRow : StatisticRow {
    int64_t lead;
    Geometry geometry;
    uint32_t key;
};

struct StatisticShared {
    int64_t run;
    Kind kind;
    bool absolute;
};

struct RoundedShared : StatisticShared {
    uint64_t seed;
    uint32_t draw;
};

template <bool kFull, bool kCounts, typename G, typename S, typename Row, typename Shared>
__device__ __forceinline__ bool accumulate_tile(const Row& row, const Shared& shared, float scale,
                                                int64_t tile, uint32_t* bins) {
    constexpr bool kRounds = std::is_same_v<Row, RoundedRow>;
    constexpr int kEntries = kNeighbours<G>;
    constexpr uint32_t kAll = (1u << kEntries) - 1;
    const Part<kEntries> part(tile, row.lead);
    const uint32_t within = kFull ? ~0u >> (32 - 4 * kEntries) : inside(part, row.numel);
    bool spoiled = false;
    uint32_t words[kRounds && kFull ? 4 * kEntries : 1];
    if constexpr (kRounds && kFull) {
        draw(part, row.geometry, shared.seed, shared.draw, row.key,
             [&](int entry, uint32_t word) { words[entry] = word; });
    }
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
        const uint32_t here = within >> (quarter * kEntries) & kAll;
        Entries<S, float, kEntries> totals;
        const int64_t start = part.quarter(quarter);
        const auto put = [&](Entries<S, float, kEntries>& rounded, int i, float value) {
            if constexpr (!kRounds) {
                rounded.set(i, value);
            } else if constexpr (kFull) {
                rounded.set_bfloat16(i, bfloat16_at_random(value, of_quarter(words, quarter, i)));
            } else if (here >> i & 1) {
                const auto index = static_cast<uint64_t>(global_index(start + i, row.geometry));
                const uint32_t word = seeded_word(shared.seed, shared.draw, row.key, index);
                rounded.set_bfloat16(i, bfloat16_at_random(value, word));
            }
        };
        spoiled |= add_to_statistic<kFull, G, Entries<S, float, kEntries>, kEntries>(
            row.statistic, row.grad, shared.kind, scale, start, row.numel, here, totals, put);
        if constexpr (kCounts) {
#pragma unroll
            for (int i = 0; i < kEntries; ++i) {
                // what was stored, not what was rounded
                const float total = rounded_to(row.statistic.dtype, totals.get(i));
                if ((here >> i & 1) && is_finite(total)) {
                    const uint32_t key =
                        shared.absolute ? unsigned_key<true>(total) : unsigned_key<false>(total);
                    count_in(*reinterpret_cast<Bins*>(bins), key >> kFirstShift);
                }
            }
        }
    }
    return spoiled;
}

template <bool kCounts, typename G, typename S, typename Row, typename Shared>
__global__ void __launch_bounds__(Part<kNeighbours<G>>::kThreads, 2)
    accumulate_tiles(const __grid_constant__ Rows<Row, Shared> args) {
    __shared__ Bins bins;
    if constexpr (kCounts) {
        clear(bins);
    }
    uint32_t block = blockIdx.x;
    const Row& row = args.rows[args.row_of(block)];
    const float scale = static_cast<float>(read(row.scale));
    const int64_t first = block * args.shared.run, end = first + args.shared.run;
    bool spoiled = false;
    for (int64_t tile = first; tile < end && tile * kTile - row.lead < row.numel; ++tile) {
        spoiled |= is_full(row.aligned, tile, row.lead, row.numel)
                       ? accumulate_tile<true, kCounts, G, S>(row, args.shared, scale, tile, bins)
                       : accumulate_tile<false, kCounts, G, S>(row, args.shared, scale, tile, bins);
    }
    // whoever finds something writes the same byte
    if (spoiled) {
        *row.nonfinite = true;
    }
    if constexpr (kCounts) {
        add_up(bins, row.counts, 11);
    }
}

template <bool kCounting, typename G, typename S, bool kRounding = false>
struct Accumulation {
    using Grad = G;
    using Statistic = S;
    using Row = std::conditional_t<kRounding, RoundedRow, StatisticRow>;
    using Shared = std::conditional_t<kRounding, RoundedShared, StatisticShared>;
    static constexpr bool kCounts = kCounting, kRounds = kRounding;

    static bool fits(const AccumulateTensor& tensor) {
        return (tensor.counts != nullptr) == kCounting && tensor.rounds == kRounding &&
               cuda::fits<G>(tensor.grad) && cuda::fits<S>(tensor.statistic);
    }
};

// exact selection

struct HistogramRow {
    static constexpr int64_t lead = 0;
    int64_t numel;
    Array scores;
    Geometry geometry;
    const int64_t *prefix, *tie;
    int64_t* counts;
    bool aligned;
};

struct HistogramShared {
    int64_t run;
    int shift, width;
    bool absolute;
};

using HistogramArgs = Rows<HistogramRow, HistogramShared>;

template <bool kFull, typename Tag>
__device__ __forceinline__ void count_tile(const HistogramRow& row, const HistogramShared& shared,
                                           int64_t tile, Bins& bins) {
    constexpr int kEntries = kNeighbours<Tag>;
    const Part<kEntries> part(tile, 0);
    const int low = low_bits(row.scores.dtype);
    const int64_t prefix = *row.prefix, tie = row.tie == nullptr ? 0 : *row.tie;
    const uint64_t last = (uint64_t{1} << shared.width) - 1;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
        const int64_t start = part.quarter(quarter);
        Entries<Tag, float, kEntries> scores;
        scores.template load<kFull>(row.scores, start, row.numel);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            const float score = scores.get(i);
            uint64_t digits =
                (shared.absolute ? unsigned_key<true>(score) : unsigned_key<false>(score)) >> low;
            bool counted = is_finite(score) && (kFull || start + i < row.numel);
            if (row.tie != nullptr) {
                counted = counted && static_cast<int64_t>(digits) == tie;
                if (counted) {
                    digits = static_cast<uint64_t>(global_index(start + i, row.geometry));
                }
            }
            if (counted && static_cast<int64_t>(digits >> shared.shift >> shared.width) == prefix) {
                count_in(bins, static_cast<uint32_t>(digits >> shared.shift & last));
            }
        }
    }
}

template <typename Tag>
__global__ void __launch_bounds__(Part<kNeighbours<Tag>>::kThreads)
    count_tiles(const __grid_constant__ HistogramArgs args) {
    __shared__ Bins bins;
    clear(bins);
    uint32_t block = blockIdx.x;
    const HistogramRow& row = args.rows[args.row_of(block)];
    const int64_t first = block * args.shared.run, end = first + args.shared.run;
    for (int64_t tile = first; tile < end && tile * kTile < row.numel; ++tile) {
        if (is_full(row.aligned, tile, 0, row.numel)) {
            count_tile<true, Tag>(row, args.shared, tile, bins);
        } else {
            count_tile<false, Tag>(row, args.shared, tile, bins);
        }
    }
    add_up(bins, row.counts, args.shared.width);
}

template <typename ScoreTag>
struct Scores {
    using Tag = ScoreTag;

    static bool fits(const HistogramTensor& tensor) { return cuda::fits<Tag>(tensor.scores); }
};

// Listing: a thread has neighbours, so that the order of threads is that of entries.
constexpr int kRow = 16;
constexpr int kRowThreads = static_cast<int>(kTile) / kRow;

struct CompactRow {
    MaskRow mask;
    uint8_t* bits;
    void* indices;
    int64_t* places;  // of this tensor's tiles
    int64_t* total;
    bool is_64_bit, aligned;
};

struct CompactShared {
    bool absolute;
};

using CompactArgs = Rows<CompactRow, CompactShared>;

// The thread's entries of a tile that pass, one bit each.
__device__ __forceinline__ uint32_t passing_row(const CompactRow& row, bool absolute, int64_t tile,
                                                int64_t& start) {
    const MaskRow& mask = row.mask;
    start = tile * kTile + threadIdx.x * static_cast<int64_t>(kRow);
    const ReadyCut cut(mask.cut_key, mask.last_tie, mask.geometry, mask.numel);
    if (is_full(row.aligned, tile, 0, mask.numel)) {
        return absolute ? passing<true, true, kRow>(mask.array, cut, start, mask.numel)
                        : passing<true, false, kRow>(mask.array, cut, start, mask.numel);
    }
    const int64_t left = mask.numel - start;
    if (left <= 0) {
        return 0;
    }
    const uint32_t bits = absolute ? passing<false, true, kRow>(mask.array, cut, start, mask.numel)
                                   : passing<false, false, kRow>(mask.array, cut, start, mask.numel);
    return left < kRow ? bits & ((1u << left) - 1) : bits;
}

// The sum of what the threads before this one have; `shared` is room for one number a thread.
template <typename T>
__device__ __forceinline__ T sum_before(T own, T* shared) {
    shared[threadIdx.x] = own;
    __syncthreads();
    for (uint32_t distance = 1; distance < blockDim.x; distance *= 2) {
        const T before = threadIdx.x >= distance ? shared[threadIdx.x - distance] : T(0);
        __syncthreads();
        shared[threadIdx.x] += before;
        __syncthreads();
    }
    return shared[threadIdx.x] - own;
}

__global__ void __launch_bounds__(kRowThreads) count_passing(const __grid_constant__ CompactArgs args) {
    __shared__ uint32_t total;
    if (threadIdx.x == 0) {
        total = 0;
    }
    __syncthreads();
    uint32_t tile = blockIdx.x;
    const CompactRow& row = args.rows[args.row_of(tile)];
    int64_t start;
    const auto found = static_cast<uint32_t>(__popc(passing_row(row, args.shared.absolute, tile, start)));
    if (found != 0) {
        atomicAdd(&total, found);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        row.places[tile] = total;
    }
}

// Counts become places: a block adds up the tiles of one tensor.
__global__ void __launch_bounds__(kRowThreads) add_up_places(const __grid_constant__ CompactArgs args) {
    __shared__ int64_t sums[kRowThreads];
    uint32_t block = blockIdx.x;
    const CompactRow& row = args.rows[args.row_of(block)];
    const int64_t tiles = (row.mask.numel + kTile - 1) / kTile;
    int64_t before = 0;
    for (int64_t first = 0; first < tiles; first += kRowThreads * kRow) {
        const int64_t start = first + threadIdx.x * static_cast<int64_t>(kRow);
        int64_t own = 0;
        for (int64_t tile = start; tile < start + kRow && tile < tiles; ++tile) {
            own += row.places[tile];
        }
        int64_t place = before + sum_before(own, sums);
        before += sums[kRowThreads - 1];
        for (int64_t tile = start; tile < start + kRow && tile < tiles; ++tile) {
            const int64_t count = row.places[tile];
            row.places[tile] = place;
            place += count;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        *row.total = before;
    }
}

template <typename Index>
__device__ __forceinline__ void put_indices(uint32_t bits, int64_t start, void* indices, int64_t place) {
    Index* target = static_cast<Index*>(indices) + place;
    for (int i = 0; i < kRow; ++i) {
        if (bits >> i & 1) {
            *target++ = static_cast<Index>(start + i);
        }
    }
}

__global__ void __launch_bounds__(kRowThreads) write_passing(const __grid_constant__ CompactArgs args) {
    __shared__ int32_t sums[kRowThreads];
    uint32_t tile = blockIdx.x;
    const CompactRow& row = args.rows[args.row_of(tile)];
    int64_t start;
    const uint32_t bits = passing_row(row, args.shared.absolute, tile, start);
    if (row.bits != nullptr) {
        // masks are padded to words of 32
        if (start < (row.mask.numel + 31) / 32 * 32) {
            reinterpret_cast<uint16_t*>(row.bits)[start / 16] = static_cast<uint16_t>(bits);
        }
        return;
    }
    const int64_t place = row.places[tile] + sum_before(static_cast<int32_t>(__popc(bits)), sums);
    if (row.is_64_bit) {
        put_indices<int64_t>(bits, start, row.indices, place);
    } else {
        put_indices<int32_t>(bits, start, row.indices, place);
    }
}

std::vector<CompactRow> compact_rows(const CompactCall& call) {
    std::vector<CompactRow> rows;
    const bool lists = call.places != nullptr;
    int64_t place = 0;
    for (size_t i = 0; i < call.tensors.size(); ++i) {
        const CompactTensor& tensor = call.tensors[i];
        rows.push_back({MaskRow(tensor.mask, 0), tensor.bits, tensor.indices,
                        lists ? call.places + place : nullptr, lists ? call.totals + i : nullptr,
                        tensor.is_64_bit, is_aligned(tensor.mask, 0)});
        place += tiles_of(tensor.mask.numel);
    }
    return rows;
}

// norms

struct NormRow {
    MaskRow mask;
    Array grad;
    IndexArray indices;
    double* sums;
    bool aligned;
};

struct NormShared {
    SeededRule seeded;
};

using NormArgs = Rows<NormRow, NormShared>;

constexpr int kNormThreads = 256;

// Adds up the threads of a block, in an order that is always the same.
__device__ __forceinline__ void add_up_threads(double own, double* target) {
    __shared__ double sums[kNormThreads];
    sums[threadIdx.x] = own;
    __syncthreads();
    for (uint32_t distance = blockDim.x / 2; distance != 0; distance /= 2) {
        if (threadIdx.x < distance) {
            sums[threadIdx.x] += sums[threadIdx.x + distance];
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        *target = sums[0];
    }
}

template <bool kFull, typename Tag>
__device__ __forceinline__ double norm_of_tile(const NormRow& row, const NormShared& shared, int64_t tile) {
    constexpr int kEntries = kNeighbours<Tag>;
    const Part<kEntries> part(tile, row.mask.lead);
    const uint32_t selected = select<kFull, true>(row.mask, shared.seeded, part);
    double sum = 0;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
        Entries<Tag, double, kEntries> grads;
        grads.template load<kFull>(row.grad, part.quarter(quarter), row.mask.numel);
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            const double value = selected >> (quarter * kEntries + i) & 1 ? grads.get(i) : 0.0;
            sum += value * value;
        }
    }
    return sum;
}

template <typename Tag>
__global__ void __launch_bounds__(Part<kNeighbours<Tag>>::kThreads)
    norm_of_selected(const __grid_constant__ NormArgs args) {
    uint32_t tile = blockIdx.x;
    const NormRow& row = args.rows[args.row_of(tile)];
    const double sum = is_full(row.aligned, tile, row.mask.lead, row.mask.numel)
                           ? norm_of_tile<true, Tag>(row, args.shared, tile)
                           : norm_of_tile<false, Tag>(row, args.shared, tile);
    add_up_threads(sum, row.sums + tile);
}

// The tiles, the threads and the order of the additions are those of a tensor of the listed entries alone, in
// float32 or float64.
using NormList = Part<kNeighbours<F32>>;
static_assert(kNeighbours<F32> == kNeighbours<Any>);

__global__ void __launch_bounds__(NormList::kThreads) norm_of_listed(const __grid_constant__ NormArgs args) {
    constexpr int kEntries = kNeighbours<F32>;
    uint32_t tile = blockIdx.x;
    const NormRow& row = args.rows[args.row_of(tile)];
    const NormList part(tile, 0);
    double sum = 0;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
        const int64_t first = part.quarter(quarter);
        int64_t indices[kEntries];
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            const int64_t place = first + i;
            indices[i] = place < row.indices.count ? index_at(row.indices, place, row.mask.numel) : 0;
        }
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            if (first + i < row.indices.count) {
                const double value = load_any<double>(row.grad.data, row.grad.dtype, indices[i]);
                sum += value * value;
            }
        }
    }
    add_up_threads(sum, row.sums + tile);
}

struct SumsArgs {
    const double* sums;
    int64_t count;
    double* total;
};

__global__ void __launch_bounds__(kNormThreads) add_up_sums(const __grid_constant__ SumsArgs args) {
    double sum = 0;
    for (int64_t i = threadIdx.x; i < args.count; i += kNormThreads) {
        sum += args.sums[i];
    }
    add_up_threads(sum, args.total);
}

template <typename GradTag>
struct Norm {
    using Tag = GradTag;

    static bool fits(const NormRow& row) { return cuda::fits<Tag>(row.grad); }
};

int64_t sums_of(const NormTensor& tensor, bool indexed) {
    return indexed                              ? tiles_of(tensor.indices.count)
           : tensor.mask.form == Form::kNothing ? 0
                                                : tiles_of(tensor.mask.numel, tensor.lead);
}

}  // namespace

void accumulate(AccumulateCall& call) {
    const auto add = [&]<typename A>(A, const std::vector<size_t>& places) {
        using Row = typename A::Row;
        std::vector<Row> rows;
        for (const size_t place : places) {
            const AccumulateTensor& tensor = call.tensors[place];
            StatisticRow row = {
                tensor.numel,
                tensor.statistic,
                tensor.grad,
                tensor.scale,
                tensor.nonfinite,
                tensor.counts,
                is_aligned(tensor.statistic, tensor.lead) && is_aligned(tensor.grad, tensor.lead)};
            if constexpr (A::kRounds) {
                row.aligned = row.aligned && has_whole_tiles(tensor.geometry, tensor.numel);
                rows.push_back({row, tensor.lead, tensor.geometry, tensor.rounding_key});
            } else {
                rows.push_back(row);
            }
        }
        const StatisticShared plain = {A::kCounts ? run_of(rows) : 1, call.kind, call.absolute};
        typename A::Shared shared;
        if constexpr (A::kRounds) {
            shared = {plain, call.rounding_seed, call.rounding_draw};
        } else {
            shared = plain;
        }
        launch_rows(
            accumulate_tiles<A::kCounts, typename A::Grad, typename A::Statistic, Row, typename A::Shared>,
            rows, shared, Part<kNeighbours<typename A::Grad>>::kThreads, call.stream,
            [&](const Row& row) { return runs_of(row, shared.run); });
    };
    by_combination(call.tensors, add,  //
                   Accumulation<false, F32, F32>(), Accumulation<true, F32, F32>(),
                   Accumulation<false, BF16, F32>(), Accumulation<true, BF16, F32>(),
                   Accumulation<false, BF16, BF16>(), Accumulation<true, BF16, BF16>(),
                   Accumulation<false, F16, F32>(), Accumulation<true, F16, F32>(),
                   Accumulation<false, Any, Any>(), Accumulation<true, Any, Any>(),
                   Accumulation<false, F32, BF16, true>(), Accumulation<true, F32, BF16, true>(),
                   Accumulation<false, BF16, BF16, true>(), Accumulation<true, BF16, BF16, true>(),
                   Accumulation<false, Any, BF16, true>(), Accumulation<true, Any, BF16, true>());
}

void histogram(HistogramCall& call) {
    const auto count = [&]<typename S>(S, const std::vector<size_t>& places) {
        std::vector<HistogramRow> rows;
        for (const size_t place : places) {
            const HistogramTensor& tensor = call.tensors[place];
            rows.push_back({tensor.numel, tensor.scores, tensor.geometry, tensor.prefix, tensor.tie,
                            tensor.counts, is_aligned(tensor.scores)});
        }
        const HistogramShared shared = {run_of(rows), call.shift, call.width, call.absolute};
        launch_rows(count_tiles<typename S::Tag>, rows, shared, Part<kNeighbours<typename S::Tag>>::kThreads,
                    call.stream, [&](const HistogramRow& row) { return runs_of(row, shared.run); });
    };
    by_combination(call.tensors, count, Scores<F32>(), Scores<BF16>(), Scores<Any>());
}

int64_t places_of(const CompactCall& call) {
    int64_t tiles = 0;
    for (const CompactTensor& tensor : call.tensors) {
        tiles += tiles_of(tensor.mask.numel);
    }
    return tiles;
}

const auto tiles_of_mask = [](const auto& row) { return tiles_of(row.mask.numel, row.mask.lead); };

void count_selected(CompactCall& call) {
    const std::vector<CompactRow> rows = compact_rows(call);
    const CompactShared shared = {call.absolute};
    launch_rows(count_passing, rows, shared, kRowThreads, call.stream, tiles_of_mask);
    launch_rows(add_up_places, rows, shared, kRowThreads, call.stream,
                [](const CompactRow&) { return int64_t{1}; });
}

void compact(CompactCall& call) {
    launch_rows(write_passing, compact_rows(call), CompactShared{call.absolute}, kRowThreads, call.stream,
                tiles_of_mask);
}

int64_t sums_of(const NormCall& call) {
    int64_t sums = 0;
    for (const NormTensor& tensor : call.tensors) {
        sums += sums_of(tensor, call.indexed);
    }
    return sums;
}

void norm(NormCall& call) {
    std::vector<NormRow> rows;
    double* sums = call.sums;
    for (const NormTensor& tensor : call.tensors) {
        const int64_t needed = sums_of(tensor, call.indexed);
        if (needed != 0) {
            rows.push_back({MaskRow(tensor.mask, tensor.lead), tensor.grad, tensor.indices, sums,
                            is_aligned(tensor.grad, tensor.lead) && is_aligned(tensor.mask, tensor.lead)});
        }
        sums += needed;
    }
    const NormShared shared = {call.seeded};
    if (call.indexed) {
        launch_rows(norm_of_listed, rows, shared, NormList::kThreads, call.stream,
                    [](const NormRow& row) { return tiles_of(row.indices.count); });
    } else {
        const auto add = [&]<typename N>(N, const std::vector<size_t>& places) {
            std::vector<NormRow> chosen;
            for (const size_t place : places) {
                chosen.push_back(rows[place]);
            }
            launch_rows(norm_of_selected<typename N::Tag>, chosen, shared,
                        Part<kNeighbours<typename N::Tag>>::kThreads, call.stream, tiles_of_mask);
        };
        by_combination(rows, add, Norm<F32>(), Norm<BF16>(), Norm<F16>(), Norm<Any>());
    }
    launch(add_up_sums, 1, kNormThreads, call.stream, SumsArgs{call.sums, sums - call.sums, call.total});
}

}  // namespace sparse_optim::cuda
