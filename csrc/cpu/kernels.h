// The functions that run on a range of blocks, in one version for each set of vector instructions.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <string>
#include <vector>

#include "../verbs.h"

namespace sparse_optim::cpu {

struct Kernels {
    const char* level;
    void (*adamw)(DenseCall&, int64_t begin, int64_t end);
    void (*adamw_indexed)(IndexedCall&, int64_t begin, int64_t end);
    void (*gather)(GatherCall&, int64_t begin, int64_t end);
    void (*apply_delta)(DeltaCall&, int64_t begin, int64_t end);
    void (*accumulate)(AccumulateCall&, int64_t begin, int64_t end);
    void (*histogram)(HistogramCall&, int64_t begin, int64_t end);
    void (*count_selected)(CompactCall&, int64_t begin, int64_t end);
    void (*compact)(CompactCall&, int64_t begin, int64_t end);
    void (*norm)(NormCall&, int64_t begin, int64_t end);
};

// those of the widest level that this machine has, unless `use_level` has chosen another
const Kernels& kernels();
// narrowest first
std::vector<std::string> levels();
// false: this machine has no such level
bool use_level(const std::string& level);

// a thread that gets fewer blocks is hardly worth waking: 16 thousand entries take some 10 microseconds
constexpr int64_t kBlocksPerThread = 16;

template <typename Call>
void run(void (*kernel)(Call&, int64_t, int64_t), Call& call) {
    if (call.blocks.total() != 0) {
        torch::stable::parallel_for(0, call.blocks.total(), kBlocksPerThread,
                                    [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
    }
}

}  // namespace sparse_optim::cpu
