// Statistics, exact selection and norms, divided over threads.

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kernels.h"

namespace sparse_optim {

int64_t entries_up_to(int64_t last, const Geometry& geometry, int64_t numel) {
    if (last < geometry.offset) {
        return 0;
    }
    const int64_t distance = last - geometry.offset;
    const int64_t row = distance / geometry.stride, column = distance % geometry.stride;
    if (row > numel / geometry.inner) {
        return numel;
    }
    return std::min(row * geometry.inner + std::min(column + 1, geometry.inner), numel);
}

int64_t lead_of(const Geometry& geometry, int64_t numel) {
    return geometry.inner >= numel ? geometry.offset % kBlock : 0;
}

namespace cpu {
namespace {

// a thread that gets fewer entries is hardly worth waking: 16 thousand take some 10 microseconds
constexpr int64_t kBlocksPerThread = 16;

template <typename Call>
void run(void (*kernel)(Call&, int64_t, int64_t), Call& call) {
    if (call.blocks.total() != 0) {
        torch::stable::parallel_for(0, call.blocks.total(), kBlocksPerThread,
                                    [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
    }
}

}  // namespace

void accumulate(AccumulateCall& call) {
    run(kernels().accumulate, call);
}

void histogram(HistogramCall& call) {
    run(kernels().histogram, call);
}

std::vector<int64_t> count_selected(CompactCall& call) {
    call.places.assign(static_cast<size_t>(call.blocks.total()), 0);
    run(kernels().count_selected, call);
    std::vector<int64_t> totals;
    for (size_t i = 0; i < call.tensors.size(); ++i) {
        int64_t place = 0;
        const auto first = call.blocks.first(static_cast<int64_t>(i));
        const auto end = call.blocks.first(static_cast<int64_t>(i) + 1);
        for (int64_t block = first; block < end; ++block) {
            const int64_t count = call.places[static_cast<size_t>(block)];
            call.places[static_cast<size_t>(block)] = place;
            place += count;
        }
        totals.push_back(place);
    }
    return totals;
}

void compact(CompactCall& call) {
    run(kernels().compact, call);
}

double norm(NormCall& call) {
    call.sums.assign(static_cast<size_t>(call.blocks.total()), 0);
    run(kernels().norm, call);
    double total = 0;
    for (const double sum : call.sums) {
        total += sum;
    }
    return total;
}

}  // namespace cpu
}  // namespace sparse_optim
