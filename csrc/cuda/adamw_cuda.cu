// Updates on the GPU. The equation of one entry is that of the CPU: adamw.h.

#include "entries.cuh"

namespace sparse_optim::cuda {
namespace {

// What the update of one tensor needs besides its entries, in the type of its arithmetic.
template <typename T>
struct UpdateNumbers {
    AdamwScalars<T> scalars;
    BiasCorrection<T> correction;
    double lr, beta1, beta2;
};
static_assert(sizeof(UpdateNumbers<double>) <= kNumbersBytes);

// counting steps that lie on the device

struct ClockRow {
    Number step;
    bool wide;
};

struct ClockShared {
    Hyperparameters hyper;
    DeviceNumbers on_device;
};

using ClockArgs = Rows<ClockRow, ClockShared>;

// Counts one tensor's step, and derives the numbers of its update. One thread a block, one tensor a thread.
__global__ void count_steps(const __grid_constant__ ClockArgs args) {
    const DeviceNumbers& there = args.shared.on_device;
    if (read(there.found_inf) != 0) {
        return;
    }
    uint32_t block = blockIdx.x;
    const int index = args.row_of(block);
    const ClockRow& row = args.rows[index];
    const double before = read(row.step);
    store_any(const_cast<void*>(row.step.address), row.step.dtype, 0, before + 1);
    const auto step = static_cast<int32_t>(rounded_to(row.step.dtype, before + 1));
    const double lr = read(there.lr), beta1 = read(there.beta1), beta2 = read(there.beta2);
    const double eps = args.shared.hyper.eps, weight_decay = args.shared.hyper.weight_decay;
    char* const target = static_cast<char*>(there.derived) + index * kNumbersBytes;
    if (row.wide) {
        *reinterpret_cast<UpdateNumbers<double>*>(target) = {
            adamw_scalars<double>(lr, beta1, beta2, eps, weight_decay),
            bias_correction_by_squaring<double>(lr, beta1, beta2, step), lr, beta1, beta2};
    } else {
        *reinterpret_cast<UpdateNumbers<float>*>(target) = {
            adamw_scalars<float>(lr, beta1, beta2, eps, weight_decay),
            bias_correction_by_squaring<float>(lr, beta1, beta2, step), lr, beta1, beta2};
    }
}

template <typename Call>
void count(Call& call) {
    if (call.on_device.derived == nullptr) {
        return;
    }
    std::vector<ClockRow> rows;
    for (const auto& tensor : call.tensors) {
        rows.push_back({tensor.step, tensor.param.dtype == Dtype::kFloat64});
    }
    ClockShared shared = {call.hyper, call.on_device};
    for (size_t done = 0; done < rows.size(); done += ClockArgs::kMost) {
        const size_t end = std::min(done + ClockArgs::kMost, rows.size());
        launch_rows(count_steps, std::vector<ClockRow>(rows.begin() + done, rows.begin() + end), shared, 1,
                    call.stream, [](const ClockRow&) { return int64_t{1}; });
        shared.on_device.derived =
            static_cast<char*>(shared.on_device.derived) + ClockArgs::kMost * kNumbersBytes;
    }
}

// What all tensors of an update share.
template <typename T>
struct UpdateShared {
    UpdateNumbers<T> numbers;  // but for the correction
    T factor;
    Number grad_scale, found_inf;

    template <typename Call>
    explicit UpdateShared(const Call& call)
        : numbers{adamw_scalars<T>(call.hyper.lr, call.hyper.beta1, call.hyper.beta2, call.hyper.eps,
                                   call.hyper.weight_decay),
                  {},
                  call.hyper.lr,
                  call.hyper.beta1,
                  call.hyper.beta2},
          factor(static_cast<T>(call.hyper.grad_factor)),
          grad_scale(call.on_device.grad_scale),
          found_inf(call.on_device.found_inf) {}
    UpdateShared() = default;

    __device__ __forceinline__ T scaled_factor() const {
        return grad_scale.address == nullptr ? factor : factor * static_cast<T>(read(grad_scale));
    }
};

// The numbers of one tensor's update: those that the host knows, or those that a kernel has put there.
template <typename T>
struct NumbersRow {
    BiasCorrection<T> correction;
    const void* derived;

    template <typename Call, typename Tensor>
    NumbersRow(const Call& call, const Tensor& tensor, size_t index)
        : correction(bias_correction_by_squaring<T>(call.hyper.lr, call.hyper.beta1, call.hyper.beta2,
                                                    static_cast<int32_t>(tensor.step.value))),
          derived(call.on_device.derived == nullptr
                      ? nullptr
                      : static_cast<const char*>(call.on_device.derived) + index * kNumbersBytes) {}
    NumbersRow() = default;

    __device__ __forceinline__ UpdateNumbers<T> with(const UpdateNumbers<T>& shared) const {
        if (derived != nullptr) {
            return *static_cast<const UpdateNumbers<T>*>(derived);
        }
        UpdateNumbers<T> numbers = shared;
        numbers.correction = correction;
        return numbers;
    }
};

// parameter-shaped moments

template <typename T>
struct DenseRow {
    Array param, grad, exp_avg, exp_avg_sq, largest, statistic;
    Number statistic_scale;
    bool* nonfinite;
    MaskRow mask;
    NumbersRow<T> numbers;
    uint32_t rounding_key;
    bool aligned;

    DenseRow() = default;
    DenseRow(const DenseCall& call, const DenseTensor& tensor, size_t index)
        : param(tensor.param),
          grad(tensor.grad),
          exp_avg(tensor.exp_avg),
          exp_avg_sq(tensor.exp_avg_sq),
          largest(tensor.largest),
          statistic(tensor.statistic),
          statistic_scale(tensor.statistic_scale),
          nonfinite(tensor.nonfinite),
          mask(tensor.mask, tensor.lead),
          numbers(call, tensor, index),
          rounding_key(tensor.rounding_key) {
        aligned = is_aligned(tensor.mask, tensor.lead) &&
                  (!tensor.draws || has_whole_tiles(tensor.mask.geometry, tensor.mask.numel));
        for (const Array* array : {&param, &grad, &exp_avg, &exp_avg_sq, &largest, &statistic}) {
            aligned = aligned && (array->data == nullptr || is_aligned(*array, tensor.lead));
        }
    }
};

template <typename T>
struct DenseShared : UpdateShared<T> {
    T rescale;
    SeededRule seeded;
    uint64_t rounding_seed;
    DrawNumber rounding_draw;
    Unselected unselected;
    Kind kind;
    bool rounds;

    DenseShared() = default;
    explicit DenseShared(const DenseCall& call)
        : UpdateShared<T>(call),
          rescale(static_cast<T>(call.rescale)),
          seeded(call.seeded),
          rounding_seed(call.rounding_seed),
          rounding_draw(call.rounding_draw),
          unselected(call.unselected),
          kind(call.kind),
          rounds(call.rounds) {}
};

template <bool kFull, typename G, int kEntries, typename T>
__device__ __forceinline__ void observe_part(const DenseRow<T>& row, Kind kind, const Part<kEntries>& part,
                                             uint32_t within) {
    constexpr uint32_t kAll = (1u << kEntries) - 1;
    const float scale = static_cast<float>(read(row.statistic_scale));
    bool spoiled = false;
#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
        const int64_t start = part.quarter(quarter), numel = row.mask.numel;
        const uint32_t here = within >> (quarter * kEntries) & kAll;
        if (row.statistic.dtype == Dtype::kFloat32) {
            Entries<F32, float, kEntries> totals;
            spoiled |= add_to_statistic<kFull, G, decltype(totals), kEntries>(
                row.statistic, row.grad, kind, scale, start, numel, here, totals);
        } else {
            Entries<Any, float, kEntries> totals;
            spoiled |= add_to_statistic<kFull, G, decltype(totals), kEntries>(
                row.statistic, row.grad, kind, scale, start, numel, here, totals);
        }
    }
    // whoever finds something writes the same byte
    if (spoiled) {
        *row.nonfinite = true;
    }
}

// The loops over quarters are not unrolled: what the threads of a multiprocessor have under way in one
// quarter keeps its memory busy, and the code is a fourth as long.
template <bool kFull, bool kDraws, typename T, typename P, typename G, typename S, int kEntries>
__device__ __forceinline__ void update_part(const DenseRow<T>& row, const DenseShared<T>& shared,
                                            int64_t tile) {
    constexpr uint32_t kAll = (1u << kEntries) - 1;
    constexpr bool kMayRound = kDraws && (std::is_same_v<P, BF16> || std::is_same_v<P, Any>);
    const Part<kEntries> part(tile, row.mask.lead);
    const int64_t numel = row.mask.numel;
    const uint32_t within = kFull ? ~0u >> (32 - 4 * kEntries) : inside(part, numel);
    // first, because the scores of the mask may be this statistic
    if (row.statistic.data != nullptr) {
        observe_part<kFull, G>(row, shared.kind, part, within);
    }
    const uint32_t selected = select<kFull, kDraws>(row.mask, shared.seeded, part);
    const Unselected unselected =
        row.mask.form == Form::kEverything ? Unselected::kZeroGrad : shared.unselected;
    const UpdateNumbers<T> numbers = row.numbers.with(shared.numbers);
    const T factor = shared.scaled_factor(), rescale = shared.rescale;
    const bool amsgrad = row.largest.data != nullptr,
               rounds = kMayRound && shared.rounds && row.param.dtype == Dtype::kBFloat16;
    uint32_t words[kMayRound && kFull ? 4 * kEntries : 1];
    if constexpr (kMayRound && kFull) {
        if (rounds) {
            draw(part, row.mask.geometry, shared.rounding_seed, shared.rounding_draw, row.rounding_key,
                 [&](int entry, uint32_t word) { words[entry] = word; });
        }
    }

#pragma unroll 1
    for (int quarter = 0; quarter < 4; ++quarter) {
        const int64_t start = part.quarter(quarter);
        const uint32_t here = within >> (quarter * kEntries) & kAll;
        const uint32_t bits = selected >> (quarter * kEntries) & kAll;
        const uint32_t moves = unselected == Unselected::kZeroGrad ? here : bits;
        const uint32_t remembers = unselected == Unselected::kFrozen ? bits : here;
        // memory without a selected entry is not touched
        if (remembers == 0) {
            continue;
        }
        Entries<P, T, kEntries> params;
        Entries<G, T, kEntries> grads;
        Entries<S, T, kEntries> exp_avgs, exp_avg_sqs, largests;
        params.template load<kFull>(row.param, start, numel);
        grads.template load<kFull>(row.grad, start, numel);
        exp_avgs.template load<kFull>(row.exp_avg, start, numel);
        exp_avg_sqs.template load<kFull>(row.exp_avg_sq, start, numel);
        if (amsgrad) {
            largests.template load<kFull>(row.largest, start, numel);
        }
#pragma unroll
        for (int i = 0; i < kEntries; ++i) {
            const bool is_selected = bits >> i & 1;
            T grad = grads.get(i) * factor;
            grad = is_selected || unselected == Unselected::kZeroGrad ? grad * rescale : grad;
            grad = is_selected || unselected != Unselected::kZeroGrad ? grad : T(0);
            T param = params.get(i), exp_avg = exp_avgs.get(i), exp_avg_sq = exp_avg_sqs.get(i);
            // without amsgrad, nothing is larger than the square of now
            T largest = amsgrad ? largests.get(i) : -std::numeric_limits<T>::infinity();
            adamw_entry<true>(param, grad, exp_avg, exp_avg_sq, largest, numbers.scalars,
                              numbers.correction.minus_step_size, numbers.correction.square_correction);
            // a choice of bits: whatever is not selected, NaNs included, stays as it is
            if (moves >> i & 1) {
                params.set(i, param);
                if constexpr (kMayRound) {
                    if (rounds) {
                        const auto word = [&] {
                            if constexpr (kFull) {
                                return of_quarter(words, quarter, i);
                            } else {
                                const int64_t index = global_index(start + i, row.mask.geometry);
                                return seeded_word(shared.rounding_seed, shared.rounding_draw,
                                                   row.rounding_key, static_cast<uint64_t>(index));
                            }
                        };
                        params.set_bfloat16(i, bfloat16_at_random(static_cast<float>(param), word()));
                    }
                }
            }
            if (remembers >> i & 1) {
                exp_avgs.set(i, exp_avg);
                exp_avg_sqs.set(i, exp_avg_sq);
                if (amsgrad) {
                    largests.set(i, largest);
                }
            }
        }
        if (moves != 0) {
            params.template store<kFull>(row.param, start, moves);
        }
        exp_avgs.template store<kFull>(row.exp_avg, start, remembers);
        exp_avg_sqs.template store<kFull>(row.exp_avg_sq, start, remembers);
        if (amsgrad) {
            largests.template store<kFull>(row.largest, start, remembers);
        }
    }
}

template <typename T>
using DenseArgs = Rows<DenseRow<T>, DenseShared<T>>;

template <bool kDraws, typename T, typename P, typename G, typename S>
__global__ void __launch_bounds__(Part<kNeighbours<P>>::kThreads, 2)
    update_dense(const __grid_constant__ DenseArgs<T> args) {
    if (read(args.shared.found_inf) != 0) {
        return;
    }
    uint32_t tile = blockIdx.x;
    const DenseRow<T>& row = args.rows[args.row_of(tile)];
    // rare combinations of dtypes are not worth a fast path
    if (!std::is_same_v<P, Any> && is_full(row.aligned, tile, row.mask.lead, row.mask.numel)) {
        update_part<!std::is_same_v<P, Any>, kDraws, T, P, G, S, kNeighbours<P>>(row, args.shared, tile);
    } else {
        update_part<false, kDraws, T, P, G, S, kNeighbours<P>>(row, args.shared, tile);
    }
}

// The dtypes of the arithmetic, of parameters, gradients and their state, and whether random words are drawn.
template <typename Arithmetic, typename P, typename G, typename S, bool kDrawing = false>
struct Combination {
    using T = Arithmetic;
    using Param = P;
    using Grad = G;
    using State = S;
    static constexpr bool kDraws = kDrawing;

    template <typename Tensor>
    static bool fits_dtypes(const Tensor& tensor) {
        return (tensor.param.dtype == Dtype::kFloat64) == std::is_same_v<T, double> &&
               cuda::fits<P>(tensor.param) && cuda::fits<G>(tensor.grad) && cuda::fits<S>(tensor.exp_avg) &&
               cuda::fits<S>(tensor.exp_avg_sq) && cuda::fits<S>(tensor.largest);
    }
    static bool fits(const DenseTensor& tensor) { return tensor.draws == kDraws && fits_dtypes(tensor); }
    static bool fits(const IndexedTensor& tensor) { return fits_dtypes(tensor); }
};

// listed entries

template <typename T>
struct ListedRow {
    int64_t numel;
    IndexArray indices;
    Array param, grad, exp_avg, exp_avg_sq, largest, master;
    int32_t* ages;
    NumbersRow<T> numbers;

    ListedRow() = default;
    ListedRow(const IndexedCall& call, const IndexedTensor& tensor, size_t index)
        : numel(tensor.numel),
          indices(tensor.indices),
          param(tensor.param),
          grad(tensor.grad),
          exp_avg(tensor.exp_avg),
          exp_avg_sq(tensor.exp_avg_sq),
          largest(tensor.largest),
          master(tensor.master),
          ages(tensor.ages),
          numbers(call, tensor, index) {}
};

template <typename T>
struct ListedShared : UpdateShared<T> {
    bool compact_grads;

    ListedShared() = default;
    explicit ListedShared(const IndexedCall& call)
        : UpdateShared<T>(call), compact_grads(call.compact_grads) {}
};

template <typename T>
using ListedArgs = Rows<ListedRow<T>, ListedShared<T>>;

template <typename T, typename P, typename G, typename S>
__global__ void __launch_bounds__(kListedThreads) update_listed(const __grid_constant__ ListedArgs<T> args) {
    if (read(args.shared.found_inf) != 0) {
        return;
    }
    constexpr int kPerThread = kListed / kListedThreads;
    uint32_t block = blockIdx.x;
    const ListedRow<T>& row = args.rows[args.row_of(block)];
    const UpdateNumbers<T> numbers = row.numbers.with(args.shared.numbers);
    const T factor = args.shared.scaled_factor();
    const int64_t first = static_cast<int64_t>(block) * kListed + threadIdx.x, count = row.indices.count;
    // all that is far away is on its way before the first of it is used
    int64_t indices[kPerThread];
    Entries<P, T, 1> params[kPerThread];
    Entries<G, T, 1> grads[kPerThread];
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t place = first + i * kListedThreads;
        indices[i] = place < count ? index_at(row.indices, place, row.numel) : 0;
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t place = first + i * kListedThreads;
        if (place < count) {
            params[i].template load<true>(row.param, indices[i], row.numel);
            grads[i].template load<true>(row.grad, args.shared.compact_grads ? place : indices[i], row.numel);
        }
    }
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
        const int64_t place = first + i * kListedThreads;
        if (place >= count) {
            continue;
        }
        Entries<S, T, 1> exp_avg, exp_avg_sq, largest;
        exp_avg.template load<true>(row.exp_avg, place, count);
        exp_avg_sq.template load<true>(row.exp_avg_sq, place, count);
        T value = params[i].get(0);
        T* const master = static_cast<T*>(row.master.data);
        if (master != nullptr) {
            // a parameter that is no longer its rounded master was written by somebody else
            value = rounded_to(row.param.dtype, master[place]) == value ? master[place] : value;
        }
        BiasCorrection<T> correction = numbers.correction;
        if (row.ages != nullptr) {
            // the largest wraps, as in torch
            const auto age = static_cast<int32_t>(static_cast<uint32_t>(row.ages[place]) + 1);
            row.ages[place] = age;
            correction = bias_correction_by_squaring<T>(numbers.lr, numbers.beta1, numbers.beta2, age);
        }
        T most = -std::numeric_limits<T>::infinity();
        if (row.largest.data != nullptr) {
            largest.template load<true>(row.largest, place, count);
            most = largest.get(0);
        }
        T average = exp_avg.get(0), square = exp_avg_sq.get(0);
        adamw_entry<true>(value, grads[i].get(0) * factor, average, square, most, numbers.scalars,
                          correction.minus_step_size, correction.square_correction);
        exp_avg.set(0, average);
        exp_avg_sq.set(0, square);
        params[i].set(0, value);
        params[i].template store<true>(row.param, indices[i], 1);
        exp_avg.template store<true>(row.exp_avg, place, 1);
        exp_avg_sq.template store<true>(row.exp_avg_sq, place, 1);
        if (row.largest.data != nullptr) {
            largest.set(0, most);
            largest.template store<true>(row.largest, place, 1);
        }
        if (master != nullptr) {
            master[place] = value;
        }
    }
}

// gathering, and sparse differences

struct GatherRow {
    int64_t numel;
    IndexArray indices;
    Array buffer, tensor;
};

struct Nothing {};
using GatherArgs = Rows<GatherRow, Nothing>;

template <typename T>
__device__ __forceinline__ void add_at(const Array& target, int64_t place, const Array& source,
                                       int64_t from) {
    const T sum =
        load_any<T>(target.data, target.dtype, place) + load_any<T>(source.data, source.dtype, from);
    store_any(target.data, target.dtype, place, sum);
}

__global__ void __launch_bounds__(kListedThreads) gather_entries(const __grid_constant__ GatherArgs args) {
    uint32_t block = blockIdx.x;
    const GatherRow& row = args.rows[args.row_of(block)];
    const int64_t first = static_cast<int64_t>(block) * kListed;
    for (int64_t place = first + threadIdx.x; place < row.indices.count && place < first + kListed;
         place += kListedThreads) {
        const int64_t index = index_at(row.indices, place, row.numel);
        if (row.buffer.dtype == Dtype::kFloat64) {
            add_at<double>(row.buffer, place, row.tensor, index);
        } else {
            add_at<float>(row.buffer, place, row.tensor, index);
        }
    }
}

struct DeltaRow {
    int64_t numel;
    IndexArray indices;
    Array param, values;
};

struct DeltaShared {
    Mode mode;
};
using DeltaArgs = Rows<DeltaRow, DeltaShared>;

template <typename Raw>
__device__ __forceinline__ void put_raw(const DeltaRow& row, Mode mode, int64_t place, int64_t index) {
    Raw* const param = static_cast<Raw*>(row.param.data) + index;
    const Raw value = static_cast<const Raw*>(row.values.data)[place];
    *param = mode == Mode::kXor ? static_cast<Raw>(*param ^ value) : value;
}

__global__ void __launch_bounds__(kListedThreads) apply_differences(const __grid_constant__ DeltaArgs args) {
    uint32_t block = blockIdx.x;
    const DeltaRow& row = args.rows[args.row_of(block)];
    const Mode mode = args.shared.mode;
    const int64_t first = static_cast<int64_t>(block) * kListed;
    for (int64_t place = first + threadIdx.x; place < row.indices.count && place < first + kListed;
         place += kListedThreads) {
        const int64_t index = index_at(row.indices, place, row.numel);
        if (mode == Mode::kAdd) {
            if (row.param.dtype == Dtype::kFloat64) {
                add_at<double>(row.param, index, row.values, place);
            } else {
                add_at<float>(row.param, index, row.values, place);
            }
        } else if (row.param.dtype == Dtype::kFloat64) {
            put_raw<uint64_t>(row, mode, place, index);
        } else if (row.param.dtype == Dtype::kFloat32) {
            put_raw<uint32_t>(row, mode, place, index);
        } else {
            put_raw<uint16_t>(row, mode, place, index);
        }
    }
}

template <typename Row, typename Tensor>
std::vector<Row> listed_rows(const std::vector<Tensor>& tensors) {
    std::vector<Row> rows;
    for (const Tensor& tensor : tensors) {
        const auto [numel, indices, first, second] = tensor;
        rows.push_back({numel, indices, first, second});
    }
    return rows;
}

const auto blocks_of_list = [](const auto& row) { return lists_of(row.indices.count); };

}  // namespace

std::string problem(int32_t gpu) {
    return problem_of(count_steps, gpu);
}

void adamw(DenseCall& call) {
    count(call);
    const auto update = [&]<typename C>(C, const std::vector<size_t>& places) {
        std::vector<DenseRow<typename C::T>> rows;
        for (const size_t place : places) {
            rows.emplace_back(call, call.tensors[place], place);
        }
        launch_rows(
            update_dense<C::kDraws, typename C::T, typename C::Param, typename C::Grad, typename C::State>,
            rows, DenseShared<typename C::T>(call), Part<kNeighbours<typename C::Param>>::kThreads,
            call.stream, [](const auto& row) { return tiles_of(row.mask.numel, row.mask.lead); });
    };
    by_combination(call.tensors, update,  //
                   Combination<float, F32, F32, F32>(), Combination<float, F32, F32, F32, true>(),
                   Combination<float, BF16, BF16, BF16>(), Combination<float, BF16, BF16, BF16, true>(),
                   Combination<float, BF16, BF16, F32>(), Combination<float, BF16, BF16, F32, true>(),
                   Combination<float, F16, F16, F16>(), Combination<float, F16, F16, F16, true>(),
                   Combination<float, Any, Any, Any>(), Combination<float, Any, Any, Any, true>(),
                   Combination<double, Any, Any, Any>(), Combination<double, Any, Any, Any, true>());
}

void adamw_indexed(IndexedCall& call) {
    count(call);
    const auto update = [&]<typename C>(C, const std::vector<size_t>& places) {
        std::vector<ListedRow<typename C::T>> rows;
        for (const size_t place : places) {
            rows.emplace_back(call, call.tensors[place], place);
        }
        launch_rows(update_listed<typename C::T, typename C::Param, typename C::Grad, typename C::State>,
                    rows, ListedShared<typename C::T>(call), kListedThreads, call.stream, blocks_of_list);
    };
    by_combination(call.tensors, update,  //
                   Combination<float, F32, F32, F32>(), Combination<float, BF16, BF16, F32>(),
                   Combination<float, F16, F16, F32>(), Combination<float, BF16, F32, F32>(),
                   Combination<float, F16, F32, F32>(), Combination<float, Any, Any, Any>(),
                   Combination<double, Any, Any, Any>());
}

void gather(GatherCall& call) {
    launch_rows(gather_entries, listed_rows<GatherRow>(call.tensors), Nothing(), kListedThreads, call.stream,
                blocks_of_list);
}

void apply_delta(DeltaCall& call) {
    launch_rows(apply_differences, listed_rows<DeltaRow>(call.tensors), DeltaShared{call.mode},
                kListedThreads, call.stream, blocks_of_list);
}

}  // namespace sparse_optim::cuda
