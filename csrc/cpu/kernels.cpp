// kernels_body.h, compiled for every set of vector instructions that is worth it, and the choice between them
// at run time. The levels differ in speed alone: each operation is rounded by itself and sums have a fixed
// order, so that all give the same bits.

#include "kernels.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <type_traits>

#include "../adamw.h"
#include "../philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SPARSE_OPTIM_X86 1
#include <immintrin.h>
#else
#define SPARSE_OPTIM_X86 0
#endif

#define SPARSE_OPTIM_LEVEL baseline
#define SPARSE_OPTIM_VECTOR_BYTES 16
#include "kernels_body.h"
#undef SPARSE_OPTIM_LEVEL
#undef SPARSE_OPTIM_VECTOR_BYTES

#if SPARSE_OPTIM_X86

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,bmi,popcnt"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,bmi,popcnt")
#endif
#define SPARSE_OPTIM_LEVEL avx2
#define SPARSE_OPTIM_VECTOR_BYTES 32
#include "kernels_body.h"
#undef SPARSE_OPTIM_LEVEL
#undef SPARSE_OPTIM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,bmi,popcnt"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,bmi,popcnt,prefer-vector-width=512")
#endif
#define SPARSE_OPTIM_LEVEL avx512
#define SPARSE_OPTIM_VECTOR_BYTES 64
#include "kernels_body.h"
#undef SPARSE_OPTIM_LEVEL
#undef SPARSE_OPTIM_VECTOR_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // SPARSE_OPTIM_X86

namespace sparse_optim::cpu {
namespace {

std::vector<const Kernels*> usable() {
    std::vector<const Kernels*> found = {&baseline::table};
#if SPARSE_OPTIM_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi")) {
        found.push_back(&avx2::table);
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512vl")) {
            found.push_back(&avx512::table);
        }
    }
#endif
    return found;
}

std::atomic<const Kernels*>& chosen() {
    static std::atomic<const Kernels*> kernels = usable().back();
    return kernels;
}

}  // namespace

const Kernels& kernels() {
    return *chosen().load(std::memory_order_relaxed);
}

std::vector<std::string> levels() {
    std::vector<std::string> names;
    for (const Kernels* found : usable()) {
        names.push_back(found->level);
    }
    return names;
}

bool use_level(const std::string& level) {
    for (const Kernels* found : usable()) {
        if (level == found->level) {
            chosen().store(found, std::memory_order_relaxed);
            return true;
        }
    }
    return false;
}

}  // namespace sparse_optim::cpu
