// The functions that run on a range of blocks, in one version for each set of vector instructions.

#pragma once

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

}  // namespace sparse_optim::cpu
