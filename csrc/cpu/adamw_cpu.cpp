// Updates, divided over threads.

#include "kernels.h"

namespace sparse_optim::cpu {

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
