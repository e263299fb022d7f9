// What csrc/ops.cpp, which checks, hands to the code that computes: plain addresses and numbers. Every array
// is contiguous, all lengths fit, and what must not be written is const.

#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "dtypes.h"

namespace sparse_optim {

struct Array {
    void* data = nullptr;
    Dtype dtype = Dtype::kFloat32;
};

// Local entry i has the global index offset + i / inner * stride + i % inner.
struct Geometry {
    int64_t offset = 0;
    int64_t inner = 1;
    int64_t stride = 1;
};

// A cut through scores: sort keys above `key` pass, and those equal to it among the first `ties` entries.
struct Cut {
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

// What the masks of a call share when they are drawn.
struct SeededRule {
    uint64_t seed = 0;
    uint32_t draw = 0;
    uint64_t threshold = 0;
};

struct Hyperparameters {
    double lr, beta1, beta2, eps, weight_decay;
    double grad_factor;  // grad_scale, negative under maximize
};

// Entries are worked on in blocks of this many: what a block needs stays in the caches nearest to the core,
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
    double step = 0;  // the new one
    uint32_t rounding_key = 0;
    Array statistic;
    float statistic_scale = 1;
    bool nonfinite = false;  // result
};

struct DenseCall {
    std::vector<DenseTensor> tensors;
    Blocks blocks;
    Hyperparameters hyper;
    double rescale = 1;
    Unselected unselected = Unselected::kFrozen;
    SeededRule seeded;
    bool rounds = false;
    uint64_t rounding_seed = 0;
    uint32_t rounding_draw = 0;
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
    double step = 0;
};

struct IndexedCall {
    std::vector<IndexedTensor> tensors;
    Blocks blocks;
    Hyperparameters hyper;
    bool compact_grads = false;
    // an index beyond its tensor is found where it is used, before anything is written there
    std::atomic<bool> bad_index = false;
};

struct AccumulateTensor {
    int64_t numel = 0;
    Array statistic, grad;
    float scale = 1;
    bool nonfinite = false;     // result
    int64_t* counts = nullptr;  // 2^11 bins, added to
};

struct AccumulateCall {
    std::vector<AccumulateTensor> tensors;
    Blocks blocks;
    Kind kind = Kind::kSquares;
    bool absolute = false;
};

struct HistogramTensor {
    int64_t numel = 0;
    Array scores;
    Geometry geometry;
    int64_t prefix = 0;
    int64_t tie = 0;
    int64_t* counts = nullptr;
};

struct HistogramCall {
    std::vector<HistogramTensor> tensors;
    Blocks blocks;
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
    bool absolute = false;
    std::vector<int64_t> places;  // of the first selected entry of each block in its list
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
    bool indexed = false;
    SeededRule seeded;
    std::vector<double> sums;  // one a block, so that the total does not depend on the threads
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
    Mode mode = Mode::kReplace;
    std::atomic<bool> bad_index = false;
};

// How many of the first entries of a tensor have global indices up to `last`: global indices ascend with
// local ones.
int64_t entries_up_to(int64_t last, const Geometry& geometry, int64_t numel);

// How many entries of the first tile lie before this tensor, where its entries are a run of the full
// tensor's.
int64_t lead_of(const Geometry& geometry, int64_t numel);

namespace cpu {

void adamw(DenseCall& call);
void adamw_indexed(IndexedCall& call);
void gather(GatherCall& call);
void apply_delta(DeltaCall& call);
void accumulate(AccumulateCall& call);
void histogram(HistogramCall& call);
// fills `places` and returns the number of selected entries per tensor
std::vector<int64_t> count_selected(CompactCall& call);
void compact(CompactCall& call);
double norm(NormCall& call);

}  // namespace cpu
}  // namespace sparse_optim
