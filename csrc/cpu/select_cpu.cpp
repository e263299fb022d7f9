// Statistics, exact selection and norms, divided over threads.

#include "kernels.h"

namespace sparse_optim::cpu {

void accumulate(AccumulateCall& call) {
    run(kernels().accumulate, call);
}

void histogram(HistogramCall& call) {
    run(kernels().histogram, call);
}

int64_t places_of(const CompactCall& call) {
    return call.blocks.total();
}

void count_selected(CompactCall& call) {
    run(kernels().count_selected, call);
    for (size_t i = 0; i < call.tensors.size(); ++i) {
        int64_t place = 0;
        const auto first = call.blocks.first(static_cast<int64_t>(i));
        const auto end = call.blocks.first(static_cast<int64_t>(i) + 1);
        for (int64_t block = first; block < end; ++block) {
            const int64_t count = call.places[block];
            call.places[block] = place;
            place += count;
        }
        call.totals[i] = place;
    }
}

void compact(CompactCall& call) {
    run(kernels().compact, call);
}

int64_t sums_of(const NormCall& call) {
    return call.blocks.total();
}

void norm(NormCall& call) {
    run(kernels().norm, call);
    *call.total = 0;
    for (int64_t block = 0; block < call.blocks.total(); ++block) {
        *call.total += call.sums[block];
    }
}

}  // namespace sparse_optim::cpu
