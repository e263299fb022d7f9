// Updates, divided over threads.

#include <torch/csrc/stable/ops.h>

#include "kernels.h"

namespace sparse_optim::cpu {
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

void adamw(DenseCall& call) {
    run(kernels().adamw, call);
}

void adamw_indexed(IndexedCall& call) {
    run(kernels().adamw_indexed, call);
}

void gather(GatherCall& call) {
    run(kernels().gather, call);
}

void apply_delta(DeltaCall& call) {
    run(kernels().apply_delta, call);
}

}  // namespace sparse_optim::cpu
