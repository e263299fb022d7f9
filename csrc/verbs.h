// What csrc/ops.cpp, which checks, hands to the code that computes: plain addresses and numbers. Every array
// is contiguous, all lengths fit, and what must not be written is const.

#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <vector>

#include "dtypes.h"

namespace sparse_optim {

struct Array {
    void* data = nullptr;
    Dtype dtype = Dtype::kFloat32;
};

// A number that the host knows, or that lies on the device of the call, where only a kernel can read it.
struct Number {
    double value = 0;
    const void* address = nullptr;
    Dtype dtype = Dtype::kFloat32;
};

// Local entry i has the global index offset + i / inner * stride + i % inner.
struct Geometry {
    int64_t offset = 0;
    int64_t inner = 1;
    int64_t stride = 1;
};

// A cut through scores: sort keys above `key` pass, and those equal to it up to the global index `last_tie`.
// On the CPU these two are resolved beforehand: `ties` is the number of leading entries that count among the
// ties.
struct Cut {
    const int64_t* key_address = nullptr;
    const int64_t* last_tie_address = nullptr;
    int64_t key = 0;
    int64_t ties = 0;
};

enum class Form : uint8_t { kEverything, kNothing, kBits, kSeeded, kScores };
enum class Unselected : uint8_t { kFrozen, kZeroGrad, kTrack };
enum class Kind : uint8_t { kSquares, kSigned, kAbsolute };

// Which entries of one tensor are selected.
struct Mask {
    Form form = Form::kEverything;
    int64_t numel = 0;
    Geometry geometry;
    const uint8_t* bits = nullptr;
    uint32_t key = 0;
    Array scores;
    Cut cut;
};

// The number of a draw. Where it is counted on the device, its low bits are read there.
struct DrawNumber {
    uint32_t number = 0;
    const int64_t* clock = nullptr;

    SPARSE_OPTIM_HOST_DEVICE operator uint32_t() const {
        return clock == nullptr ? number : number | static_cast<uint32_t>(*clock & 0x0FFFFFFF);
    }
};

// What the masks of a call share when they are drawn.
struct SeededRule {
    uint64_t seed = 0;
    DrawNumber draw;
    uint64_t threshold = 0;
};

struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay;
    double grad_factor;  // grad_scale, negative under maximize
};

// Those of them that lie on the device, and where numbers that are derived from them there are put: room for
// kNumbersBytes per tensor.
struct DeviceNumbers {
    Number lr, beta1, beta2, grad_scale, found_inf;
    void* derived = nullptr;
};
constexpr int64_t kNumbersBytes = 96;

// The CPU works on blocks of this many entries: what a block needs stays in the caches nearest to the core,
// and it is a tile of the seeded rule.
constexpr int64_t kBlock = 1024;

// The blocks of a list of tensors, numbered through, so that threads share entries and not tensors.
class Blocks {
  public:
    // `lead` shortens the first block: with it, blocks are whole tiles of the seeded rule
    void add(int64_t numel, int64_t lead = 0) {
        first_.push_back(first_.back() + (numel == 0 ? 0 : (lead + numel + kBlock - 1) / kBlock));
    }
    int64_t total() const { return first_.back(); }
    int64_t first(int64_t tensor) const { return first_[tensor]; }
    int64_t tensor_of(int64_t block) const {
        int64_t low = 0, high = static_cast<int64_t>(first_.size()) - 1;
        while (high - low > 1) {
            const int64_t middle = (low + high) / 2;
            (first_[middle] <= block ? low : high) = middle;
        }
        return low;
    }

  private:
    std::vector<int64_t> first_ = {0};
};

struct DenseTensor {
    int64_t lead = 0;
    Mask mask;
    Array param, grad, exp_avg, exp_avg_sq, largest;
    Number step;         // the new one, or where the old one lies
    bool draws = false;  // random words, for its mask or for rounding
    uint32_t rounding_key = 0;
    Array statistic;
    Number statistic_scale = {1};
    bool* nonfinite = nullptr;  // raised
};

struct DenseCall {
    std::vector<DenseTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    Hyperparameters hyper;
    DeviceNumbers on_device;
    double rescale = 1;
    Unselected unselected = Unselected::kFrozen;
    SeededRule seeded;
    bool rounds = false;
    uint64_t rounding_seed = 0;
    DrawNumber rounding_draw;
    Kind kind = Kind::kSquares;
};

struct IndexArray {
    const void* data = nullptr;
    bool is_64_bit = false;
    int64_t count = 0;
};

struct IndexedTensor {
    int64_t numel = 0;
    IndexArray indices;
    Array param, grad, exp_avg, exp_avg_sq, largest, master;
    int32_t* ages = nullptr;
    Number step;
};

struct IndexedCall {
    std::vector<IndexedTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    Hyperparameters hyper;
    DeviceNumbers on_device;
    bool compact_grads = false;
    // an index beyond its tensor is found where it is used, before anything is written there
    std::atomic<bool> bad_index = false;
};

struct AccumulateTensor {
    int64_t numel = 0;
    Array statistic, grad;
    Number scale = {1};
    bool* nonfinite = nullptr;  // raised
    int64_t* counts = nullptr;  // 2^11 bins, added to
    // what only a statistic that is rounded stochastically needs
    bool rounds = false;
    uint32_t rounding_key = 0;
    Geometry geometry;
    int64_t lead = 0;
};

struct AccumulateCall {
    std::vector<AccumulateTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    Kind kind = Kind::kSquares;
    bool absolute = false;
    uint64_t rounding_seed = 0;
    uint32_t rounding_draw = 0;
};

struct HistogramTensor {
    int64_t numel = 0;
    Array scores;
    Geometry geometry;
    const int64_t* prefix = nullptr;
    const int64_t* tie = nullptr;
    int64_t* counts = nullptr;
};

struct HistogramCall {
    std::vector<HistogramTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    int shift = 0;
    int width = 0;
    bool absolute = false;
    bool among_ties = false;
};

struct CompactTensor {
    Mask mask;  // its form is kScores
    uint8_t* bits = nullptr;
    void* indices = nullptr;
    bool is_64_bit = false;
};

struct CompactCall {
    std::vector<CompactTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    bool absolute = false;
    int64_t* places = nullptr;  // of the first selected entry of each block in its list
    int64_t* totals = nullptr;  // of each tensor
};

struct NormTensor {
    int64_t lead = 0;
    Mask mask;
    Array grad;
    IndexArray indices;
};

struct NormCall {
    std::vector<NormTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    bool indexed = false;
    SeededRule seeded;
    double* sums = nullptr;  // one a block, so that the total does not depend on the threads
    double* total = nullptr;
    std::atomic<bool> bad_index = false;
};

struct GatherTensor {
    int64_t numel = 0;
    IndexArray indices;
    Array buffer, tensor;
};

struct GatherCall {
    std::vector<GatherTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    std::atomic<bool> bad_index = false;
};

enum class Mode : uint8_t { kReplace, kAdd, kXor };

struct DeltaTensor {
    int64_t numel = 0;
    IndexArray indices;
    Array param, values;
};

struct DeltaCall {
    std::vector<DeltaTensor> tensors;
    Blocks blocks;
    void* stream = nullptr;
    Mode mode = Mode::kReplace;
    std::atomic<bool> bad_index = false;
};

// How many of the first entries of a tensor have global indices up to `last`: global indices ascend with
// local ones.
SPARSE_OPTIM_HOST_DEVICE int64_t entries_up_to(int64_t last, const Geometry& geometry, int64_t numel) {
    if (last < geometry.offset) {
        return 0;
    }
    const int64_t distance = last - geometry.offset;
    const int64_t row = distance / geometry.stride, column = distance % geometry.stride;
    if (row > numel / geometry.inner) {
        return numel;
    }
    const int64_t within = column + 1 < geometry.inner ? column + 1 : geometry.inner;
    const int64_t entries = row * geometry.inner + within;
    return entries < numel ? entries : numel;
}

SPARSE_OPTIM_HOST_DEVICE int64_t global_index(int64_t local, const Geometry& geometry) {
    return geometry.offset + local / geometry.inner * geometry.stride + local % geometry.inner;
}

// How many entries of the first tile lie before this tensor, where its entries are a run of the full
// tensor's.
inline int64_t lead_of(const Geometry& geometry, int64_t numel) {
    return geometry.inner >= numel ? geometry.offset % kBlock : 0;
}

// Both devices have these. What they need of memory, the caller allots.

namespace cpu {

void adamw(DenseCall& call);
void adamw_indexed(IndexedCall& call);
void gather(GatherCall& call);
void apply_delta(DeltaCall& call);
void accumulate(AccumulateCall& call);
void histogram(HistogramCall& call);
// how many `places` and `sums` a call needs
int64_t places_of(const CompactCall& call);
int64_t sums_of(const NormCall& call);
// fills `places` and `totals`
void count_selected(CompactCall& call);
void compact(CompactCall& call);
void norm(NormCall& call);

}  // namespace cpu

namespace cuda {

// why the kernels cannot run on the GPU of that number; empty when they can
std::string problem(int32_t gpu);

void adamw(DenseCall& call);
void adamw_indexed(IndexedCall& call);
void gather(GatherCall& call);
void apply_delta(DeltaCall& call);
void accumulate(AccumulateCall& call);
void histogram(HistogramCall& call);
int64_t places_of(const CompactCall& call);
int64_t sums_of(const NormCall& call);
void count_selected(CompactCall& call);
void compact(CompactCall& call);
void norm(NormCall& call);

}  // namespace cuda
}  // namespace sparse_optim
