// The operators of the native library: their schemas, and the checks of what callers pass.
//
// Only torch's stable interface is included (TORCH_TARGET_VERSION makes anything else a compile error), so
// that one binary serves every Python from 3.10 and every torch from 2.10 on. Loading the library registers
// the operators; they are then called as torch.ops.sparse_optim.*.

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>

#include "philox.h"

namespace sparse_optim {
namespace {

using torch::stable::Tensor;

// 0.17 ms of Philox calls on one x86-64 core: a thread that does fewer is hardly worth waking
constexpr int64_t kCountersPerThread = 8192;

bool fits_32_bits(int64_t value) {
    return value >= 0 && value <= std::numeric_limits<uint32_t>::max();
}

// The random words of the entries start ... start + count - 1 of a tensor.
//
// A schema has one kind of int, of 64 bits and signed: a seed from 2^63 on comes as the negative number of
// the same bits. The words go back in int32 for the same reason: it holds the raw 32 bits, torch's uint32
// supports little.
Tensor philox_words(int64_t seed, int64_t draw, int64_t key, int64_t start, int64_t count) {
    STD_TORCH_CHECK(fits_32_bits(draw), "draw must be in [0, 2**32), got ", draw, "; count draws from 0.");
    STD_TORCH_CHECK(fits_32_bits(key), "key must be in [0, 2**32), got ", key,
                    "; pass the tensor key without its sign.");
    STD_TORCH_CHECK(start >= 0, "start must not be negative, got ", start, "; entries count from 0.");
    STD_TORCH_CHECK(count >= 0 && count <= std::numeric_limits<int64_t>::max() - start,
                    "count must be at least 0 and start + count below 2**63, got start=", start,
                    " and count=", count, "; ask for fewer words.");

    Tensor words = torch::stable::empty({count}, torch::headeronly::ScalarType::Int);
    if (count == 0) {
        return words;
    }
    int32_t* const out = words.mutable_data_ptr<int32_t>();
    const uint64_t first_entry = static_cast<uint64_t>(start);
    const uint64_t last_entry = first_entry + static_cast<uint64_t>(count) - 1;
    // whole tiles, so that each Philox call serves all the entries it has words for
    const uint64_t first_counter = first_entry / kTileEntries * kQuarterEntries;
    const uint64_t end_counter = (last_entry / kTileEntries + 1) * kQuarterEntries;

    const auto fill = [=](int64_t begin, int64_t end) {
        for (uint64_t counter = static_cast<uint64_t>(begin); counter < static_cast<uint64_t>(end);
             ++counter) {
            const FourWords four = seeded_words(static_cast<uint64_t>(seed), static_cast<uint32_t>(draw),
                                                static_cast<uint32_t>(key), counter);
            for (uint64_t quarter = 0; quarter < 4; ++quarter) {
                // an entry before the first is far away, modulo 2^64: one comparison for both ends
                const uint64_t distance = entry_of_counter(counter, quarter) - first_entry;
                if (distance < static_cast<uint64_t>(count)) {
                    out[distance] = static_cast<int32_t>(four.word[quarter]);
                }
            }
        }
    };
    torch::stable::parallel_for(static_cast<int64_t>(first_counter), static_cast<int64_t>(end_counter),
                                kCountersPerThread, fill);
    return words;
}

}  // namespace
}  // namespace sparse_optim

STABLE_TORCH_LIBRARY(sparse_optim, library) {
    library.def("philox_words(int seed, int draw, int key, int start, int count) -> Tensor");
}

// no tensor goes in, so no device can be read off the arguments: the kernel is the one for every device, and
// its result lies on the CPU
STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CompositeExplicitAutograd, library) {
    library.impl("philox_words", TORCH_BOX(&sparse_optim::philox_words));
}

// The library is loaded by path, but it is installed as a Python module, and such a module has this function.
PyMODINIT_FUNC PyInit__C() {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
