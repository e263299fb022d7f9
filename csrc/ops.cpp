// The operators of the native libraries: their schemas, and the checks of what callers pass.
//
// This file is compiled for each of them: for _C, which has the schemas and the CPU, and, where
// SPARSE_OPTIM_CUDA is defined, for _cuda, which adds the GPU. With SPARSE_OPTIM_EMULATED the kernels of the
// latter run on the CPU, and are operators of another name: that is how they are tested where there is no
// GPU.
//
// Only torch's stable interface is included (TORCH_TARGET_VERSION makes anything else a compile error), so
// that one binary serves every Python from 3.10 and every torch from 2.10 on. Loading the library registers
// the operators; they are then called as torch.ops.sparse_optim.*.

#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "philox.h"
#include "verbs.h"
#if !defined(SPARSE_OPTIM_CUDA)
#include "cpu/kernels.h"
#endif

#if defined(SPARSE_OPTIM_CUDA) && !defined(SPARSE_OPTIM_EMULATED)
#define SPARSE_OPTIM_ON_GPU 1
// weak, because it is part of the CUDA builds of torch alone: without it the library still loads
extern "C" __attribute__((weak)) int32_t aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace sparse_optim {
namespace {

#if defined(SPARSE_OPTIM_CUDA)
namespace backend = cuda;
constexpr bool kOnHost = false;
#else
namespace backend = cpu;
constexpr bool kOnHost = true;
#endif
#if defined(SPARSE_OPTIM_ON_GPU)
constexpr bool kOnGpu = true;
#else
constexpr bool kOnGpu = false;
#endif

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Numbers = std::vector<int64_t>;
using MaybeTensor = std::optional<Tensor>;

bool fits_32_bits(int64_t value) {
    return value >= 0 && value <= std::numeric_limits<uint32_t>::max();
}

#if !defined(SPARSE_OPTIM_CUDA)

// 0.17 ms of Philox calls on one x86-64 core: a thread that does fewer is hardly worth waking
constexpr int64_t kCountersPerThread = 8192;

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

    Tensor words = torch::stable::empty({count}, ScalarType::Int);
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

#endif

// what arguments must be

size_t length(const Tensors& tensors) {
    return tensors.size();
}

void check_length(const char* name, size_t got, size_t needed) {
    STD_TORCH_CHECK(got == needed, name, " must have one item per tensor, got ", got, " for ", needed,
                    " tensors; pass lists of equal length.");
}

void check_optional_length(const char* name, size_t got, size_t needed) {
    if (got != 0) {
        check_length(name, got, needed);
    }
}

// Where a call runs: on the device of the first tensor, and on a GPU in its current stream.
class Place {
  public:
    explicit Place(const Tensors& tensors) {
        if (!kOnGpu || tensors.empty() || !tensors[0].is_cuda()) {
            return;
        }
        index_ = tensors[0].get_device_index();
        guard_.emplace(index_);
#if defined(SPARSE_OPTIM_ON_GPU)
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                        "the CUDA verbs need a CUDA build of torch, got one without; install one.");
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream_) == 0,
                        "torch has no current stream on GPU ", index_, "; see its own message.");
#endif
    }

    void check(const char* name, const Tensor& tensor) const {
        if (kOnGpu) {
            STD_TORCH_CHECK(tensor.defined() && tensor.is_cuda() && tensor.get_device_index() == index_, name,
                            " must lie on GPU ", index_, " like the first tensor; move them there.");
        } else {
            STD_TORCH_CHECK(tensor.defined() && tensor.is_cpu(), name,
                            " must hold CPU tensors; move them there or use another backend.");
        }
    }
    void* stream() const { return stream_; }

  private:
    int32_t index_ = 0;
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    void* stream_ = nullptr;
};

void check_on_host(const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(tensor.defined() && tensor.is_cpu(), name,
                    " must hold CPU tensors; move them there or use another backend.");
}

Dtype floating(const char* name, const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Double:
            return Dtype::kFloat64;
        case ScalarType::Float:
            return Dtype::kFloat32;
        case ScalarType::BFloat16:
            return Dtype::kBFloat16;
        case ScalarType::Half:
            return Dtype::kFloat16;
        default:
            STD_TORCH_CHECK(false, name,
                            " must be float64, float32, bfloat16 or float16, got another dtype; convert it.");
    }
}

void check_type(const char* name, const Tensor& tensor, ScalarType type, const char* type_name) {
    STD_TORCH_CHECK(tensor.scalar_type() == type, name, " must be ", type_name,
                    ", got another dtype; convert it.");
}

void check_numel(const char* name, int64_t got, int64_t needed) {
    STD_TORCH_CHECK(got == needed, name, " must have ", needed, " entries, got ", got,
                    "; pass one of the right shape.");
}

void check_shape(const char* name, const Tensor& tensor, const Tensor& like) {
    const auto got = tensor.sizes(), needed = like.sizes();
    bool same = got.size() == needed.size();
    for (size_t i = 0; same && i < got.size(); ++i) {
        same = got[i] == needed[i];
    }
    STD_TORCH_CHECK(same, name, " must have the shape of its parameter, got ", tensor.numel(), " entries in ",
                    got.size(), " dimensions for ", like.numel(), " in ", needed.size(),
                    "; pass one of the same shape.");
}

// Contiguous arrays of tensors of any strides, in row-major logical order. What was copied and is written
// goes back in `finish`.
class Arrays {
  public:
    // the device is that of these tensors
    explicit Arrays(const Tensors& tensors) : place(tensors) {}

    Array read(const char* name, const Tensor& tensor) {
        place.check(name, tensor);
        return {const_cast<void*>(contiguous(tensor).const_data_ptr()), floating(name, tensor)};
    }
    Array write(const char* name, const Tensor& tensor) {
        place.check(name, tensor);
        return {writable(name, tensor), floating(name, tensor)};
    }
    const void* read_raw(const char* name, const Tensor& tensor) {
        place.check(name, tensor);
        return contiguous(tensor).const_data_ptr();
    }
    const void* read_indices(const Tensor& tensor) {
        const void* const data = read_raw("indices", tensor);
        note(data, tensor, true);
        return data;
    }
    const int64_t* read_integers(const char* name, const Tensor& tensor, size_t count) {
        check_type(name, tensor, ScalarType::Long, "int64");
        check_numel(name, tensor.numel(), static_cast<int64_t>(count));
        return static_cast<const int64_t*>(read_raw(name, tensor));
    }
    void* write_raw(const char* name, const Tensor& tensor) {
        place.check(name, tensor);
        return writable(name, tensor);
    }
    // An index is checked, then used: what is written in between must not be an index.
    void check_indices_apart() {
        std::sort(extents_.begin(), extents_.end(),
                  [](const Extent& a, const Extent& b) { return a.begin < b.begin; });
        uintptr_t end_of_indices = 0, end_of_written = 0;
        for (const Extent& extent : extents_) {
            STD_TORCH_CHECK(extent.begin >= (extent.indices ? end_of_written : end_of_indices),
                            "indices must not share memory with a tensor that is written, got an overlap; "
                            "clone them.");
            uintptr_t& end = extent.indices ? end_of_indices : end_of_written;
            end = std::max(end, extent.end);
        }
    }
    void finish() {
        for (auto& [original, copy] : written_) {
            torch::stable::copy_(original, copy);
        }
    }

    const Place place;

  private:
    struct Extent {
        uintptr_t begin, end;
        bool indices;
    };

    void note(const void* data, const Tensor& tensor, bool indices) {
        const uintptr_t begin = reinterpret_cast<uintptr_t>(data);
        if (tensor.numel() != 0) {
            extents_.push_back({begin, begin + tensor.numel() * tensor.element_size(), indices});
        }
    }
    const Tensor& contiguous(const Tensor& tensor) {
        if (tensor.is_contiguous()) {
            return tensor;
        }
        return copies_.emplace_back(torch::stable::contiguous(tensor));
    }
    void* writable(const char* name, const Tensor& tensor) {
        if (tensor.is_contiguous()) {
            void* const data = tensor.mutable_data_ptr();
            note(data, tensor, false);
            return data;
        }
        for (int64_t i = 0; i < tensor.dim(); ++i) {
            STD_TORCH_CHECK(tensor.stride(i) != 0 || tensor.size(i) < 2, name,
                            " must not be an expanded tensor, got one of ", tensor.numel(),
                            " entries; clone it.");
        }
        written_.emplace_back(tensor, torch::stable::contiguous(tensor));
        return written_.back().second.mutable_data_ptr();
    }

    Tensors copies_;
    std::vector<std::pair<Tensor, Tensor>> written_;
    std::vector<Extent> extents_;
};

// Numbers in 0-dim tensors.

double number_in(const char* name, const Tensor& tensor) {
    check_on_host(name, tensor);
    check_numel(name, tensor.numel(), 1);
    const void* const data = tensor.const_data_ptr();
    switch (floating(name, tensor)) {
        case Dtype::kFloat64:
            return *static_cast<const double*>(data);
        case Dtype::kFloat32:
            return static_cast<double>(*static_cast<const float*>(data));
        case Dtype::kBFloat16:
            return static_cast<double>(*static_cast<const torch::headeronly::BFloat16*>(data));
        case Dtype::kFloat16:
            return static_cast<double>(*static_cast<const torch::headeronly::Half*>(data));
    }
    return 0;
}

// The number plus one, as its dtype can hold it.
double count_up(const Tensor& step) {
    const double next = number_in("steps", step) + 1;
    void* const data = step.mutable_data_ptr();
    switch (floating("steps", step)) {
        case Dtype::kFloat64:
            *static_cast<double*>(data) = next;
            break;
        case Dtype::kFloat32:
            *static_cast<float*>(data) = static_cast<float>(next);
            break;
        case Dtype::kBFloat16:
            *static_cast<torch::headeronly::BFloat16*>(data) = static_cast<float>(next);
            break;
        case Dtype::kFloat16:
            *static_cast<torch::headeronly::Half*>(data) = static_cast<float>(next);
            break;
    }
    return number_in("steps", step);
}

// A number on the host is read now; one on the device is left to the kernels.
Number number(const Place& place, const char* name, const Tensor& tensor) {
    if (kOnHost || (kOnGpu && tensor.is_cpu())) {
        return {number_in(name, tensor)};
    }
    place.check(name, tensor);
    check_numel(name, tensor.numel(), 1);
    return {0, tensor.const_data_ptr(), floating(name, tensor)};
}

Number number(const Place& place, const char* name, const MaybeTensor& tensor, double otherwise) {
    return tensor ? number(place, name, *tensor) : Number{otherwise};
}

// Whether steps are counted by a kernel. On the emulated GPU only where other numbers lie there too.
bool steps_on_device(const Tensors& steps, const MaybeTensor& lr) {
    if (kOnHost || steps.empty() || (kOnGpu && steps[0].is_cpu())) {
        return false;
    }
    return kOnGpu || lr.has_value();
}

void check_steps(const Place& place, const Tensors& steps, size_t count, bool on_device) {
    check_length("steps", steps.size(), count);
    for (const Tensor& step : steps) {
        on_device ? void(number(place, "steps", step)) : void(number_in("steps", step));
    }
}

// The new step, or where the old one lies.
Number next_step(const Place& place, const Tensor& step, bool on_device) {
    return on_device ? number(place, "steps", step) : Number{count_up(step)};
}

// Three numbers a tensor, or none: then the tensors are whole.
Geometry geometry_of(const Numbers& geometries, size_t i, int64_t numel) {
    if (geometries.empty()) {
        const int64_t inner = numel > 0 ? numel : 1;
        return {0, inner, inner};
    }
    const Geometry geometry = {geometries[3 * i], geometries[3 * i + 1], geometries[3 * i + 2]};
    STD_TORCH_CHECK(geometry.offset >= 0 && geometry.inner >= 1 && geometry.stride >= 1,
                    "geometries must have offset >= 0, inner >= 1 and stride >= 1, got ", geometry.offset,
                    ", ", geometry.inner, " and ", geometry.stride, "; see reference.whole.");
    // as if the last row were as long as the tensor, which refuses nothing that exists
    const int64_t largest = std::numeric_limits<int64_t>::max();
    const int64_t rows = std::max<int64_t>(numel - 1, 0) / geometry.inner;
    STD_TORCH_CHECK(numel <= largest - geometry.offset &&
                        (rows == 0 || geometry.stride <= (largest - geometry.offset - numel) / rows),
                    "geometries must give indices below 2**63, got ", geometry.offset, ", ", geometry.inner,
                    " and ", geometry.stride, " for ", numel, " entries; see reference.whole.");
    return geometry;
}

void check_geometries(const Numbers& geometries, size_t count) {
    STD_TORCH_CHECK(geometries.empty() || geometries.size() == 3 * count,
                    "geometries must have three numbers per tensor, got ", geometries.size(), " for ", count,
                    " tensors; pass (offset, inner, stride) of each.");
}

IndexArray indices_of(Arrays& arrays, const Tensor& indices, int64_t numel) {
    const bool is_64_bit = indices.scalar_type() == ScalarType::Long;
    if (!is_64_bit) {
        check_type("indices", indices, ScalarType::Int, "int32 or int64");
    }
    STD_TORCH_CHECK(indices.dim() == 1, "indices must have one dimension, got ", indices.dim(),
                    "; list flat indices.");
    const void* const data = arrays.read_indices(indices);
    const int64_t count = indices.numel();
    if (kOnHost && count != 0) {
        // the ends of an ascending list; the rest is checked where it is used
        const auto entry = [&](int64_t i) {
            return is_64_bit ? static_cast<const int64_t*>(data)[i]
                             : int64_t{static_cast<const int32_t*>(data)[i]};
        };
        STD_TORCH_CHECK(entry(0) >= 0 && entry(count - 1) < numel, "indices must be in [0, ", numel,
                        "), got ", entry(0), " to ", entry(count - 1), "; list flat indices of this tensor.");
    }
    return {data, is_64_bit, count};
}

void check_indices_were_inside(const std::atomic<bool>& bad_index) {
    STD_TORCH_CHECK(
        !bad_index.load(),
        "indices must ascend and lie inside of their tensor, got some outside; list flat indices.");
}

// How a mask is drawn, as Python passes it: seed, draw, threshold, 1 for one word per tensor, then the keys.
struct Draws {
    explicit Draws(const char* name, const Numbers& numbers, size_t count) : given(!numbers.empty()) {
        if (!given) {
            return;
        }
        STD_TORCH_CHECK(numbers.size() == 4 + count, name, " must have one key per tensor, got ",
                        numbers.size() - std::min<size_t>(4, numbers.size()), " for ", count,
                        " tensors; pass a key for each.");
        STD_TORCH_CHECK(fits_32_bits(numbers[1]), name, ".draw must be in [0, 2**32), got ", numbers[1],
                        "; count draws from 0.");
        STD_TORCH_CHECK(numbers[2] >= 0 && numbers[2] <= int64_t{1} << 32, name,
                        ".threshold must be in [0, 2**32], got ", numbers[2], "; pass floor(keep * 2**32).");
        rule = {static_cast<uint64_t>(numbers[0]),
                {static_cast<uint32_t>(numbers[1])},
                static_cast<uint64_t>(numbers[2])};
        one_word = numbers[3] != 0;
        for (size_t i = 4; i < numbers.size(); ++i) {
            STD_TORCH_CHECK(fits_32_bits(numbers[i]), name, ".keys must be in [0, 2**32), got ", numbers[i],
                            "; pass keys without their sign.");
            keys.push_back(static_cast<uint32_t>(numbers[i]));
        }
    }

    bool given = false;
    SeededRule rule;
    bool one_word = false;
    std::vector<uint32_t> keys;
};

// Lets a clock that is given number a draw: now where it is on the host, else in the kernels.
void count_by(const Place& place, const MaybeTensor& clock, DrawNumber& draw) {
    if (clock) {
        place.check("clock", *clock);
        check_type("clock", *clock, ScalarType::Long, "int64");
        check_numel("clock", clock->numel(), 1);
        draw.clock = static_cast<const int64_t*>(clock->const_data_ptr());
        if (kOnHost) {
            draw = {draw};
        }
    }
}

// Which entries are selected, for all tensors of a call.
struct Selection {
    Selection(const Place& place, const Tensors& bits_of_all, const Numbers& seeded, const MaybeTensor& clock,
              size_t count)
        : bits(bits_of_all), draws("seeded", seeded, count) {
        check_optional_length("bits", bits.size(), count);
        // the word for a whole tensor is looked at here, so that Python has read the clock for it
        if (!draws.one_word) {
            count_by(place, clock, draws.rule.draw);
        }
    }

    Mask mask(Arrays& arrays, size_t i, int64_t numel, const Geometry& geometry) const {
        Mask mask;
        mask.numel = numel;
        mask.geometry = geometry;
        if (!bits.empty()) {
            mask.form = Form::kBits;
            check_type("bits", bits[i], ScalarType::Byte, "uint8");
            const int64_t needed = (numel + 31) / 32 * 4;
            STD_TORCH_CHECK(bits[i].numel() >= needed, "bits must have ", needed, " bytes for ", numel,
                            " entries, got ", bits[i].numel(), "; pack the mask of this very tensor.");
            mask.bits = static_cast<const uint8_t*>(arrays.read_raw("bits", bits[i]));
        } else if (draws.given && draws.one_word) {
            const uint32_t word = seeded_word(draws.rule.seed, draws.rule.draw, draws.keys[i], 0);
            mask.form = is_selected(word, draws.rule.threshold) ? Form::kEverything : Form::kNothing;
        } else if (draws.given) {
            mask.form = Form::kSeeded;
            mask.key = draws.keys[i];
        }
        return mask;
    }

    const Tensors& bits;
    Draws draws;
};

Unselected unselected_of(const std::string& name) {
    STD_TORCH_CHECK(name == "frozen" || name == "zero_grad" || name == "track",
                    "unselected must be 'frozen', 'zero_grad' or 'track', got '", name, "'; use 'frozen'.");
    return name == "frozen"  ? Unselected::kFrozen
           : name == "track" ? Unselected::kTrack
                             : Unselected::kZeroGrad;
}

Kind kind_of(const std::string& name) {
    STD_TORCH_CHECK(name == "squares" || name == "signed" || name == "absolute",
                    "kind must be 'squares', 'signed' or 'absolute', got '", name, "'; use 'squares'.");
    return name == "squares" ? Kind::kSquares : name == "signed" ? Kind::kSigned : Kind::kAbsolute;
}

// int64 sort keys and last global indices, one each per tensor.
struct Cuts {
    Cuts(Arrays& arrays, const Tensors& cuts, size_t count) {
        STD_TORCH_CHECK(cuts.size() == 2, "cuts must hold keys and last_ties, got ", cuts.size(),
                        " tensors; pass both.");
        keys = arrays.read_integers("cuts.keys", cuts[0], count);
        last_ties = arrays.read_integers("cuts.last_ties", cuts[1], count);
    }

    Cut of(size_t i, const Geometry& geometry, int64_t numel) const {
        Cut cut = {keys + i, last_ties + i};
        if (kOnHost) {
            cut.key = std::clamp<int64_t>(keys[i], 0, int64_t{1} << 32);
            cut.ties = entries_up_to(last_ties[i], geometry, numel);
        }
        return cut;
    }

    const int64_t *keys, *last_ties;
};

bool* flag_of(const Place& place, const Tensor& flag) {
    place.check("nonfinite", flag);
    check_type("nonfinite", flag, ScalarType::Bool, "bool");
    check_numel("nonfinite", flag.numel(), 1);
    return static_cast<bool*>(flag.mutable_data_ptr());
}

// the verbs; what they mean is said in sparse_optim/backends/reference.py

// The numbers of an update, on the host and on the device.
struct AllNumbers {
    AllNumbers(const Place& place, double lr, double beta1, double beta2, double eps, double weight_decay,
               bool maximize, const MaybeTensor& lr_tensor, const MaybeTensor& beta1_tensor,
               const MaybeTensor& beta2_tensor, const MaybeTensor& grad_scale, const MaybeTensor& found_inf) {
        there.lr = number(place, "lr", lr_tensor, lr);
        there.beta1 = number(place, "beta1", beta1_tensor, beta1);
        there.beta2 = number(place, "beta2", beta2_tensor, beta2);
        there.grad_scale = number(place, "grad_scale", grad_scale, 1);
        there.found_inf = number(place, "found_inf", found_inf, 0);
        const double factor = there.grad_scale.value;
        here = {there.lr.value,
                there.beta1.value,
                there.beta2.value,
                eps,
                weight_decay,
                there.grad_scale.address != nullptr ? (maximize ? -1.0 : 1.0)
                : maximize                          ? -factor
                                                    : factor};
    }
    bool skips() const { return there.found_inf.value != 0; }

    Hyperparameters here;
    DeviceNumbers there;
};

Tensor on_host(const Tensor& tensor) {
    return kOnGpu ? torch::stable::to(tensor, torch::stable::Device(torch::headeronly::DeviceType::CPU))
                  : tensor;
}

// Room on the device of `like`.
Tensor bytes_like(const Tensor& like, int64_t count) {
    return torch::stable::new_empty(like, {count}, ScalarType::Byte);
}

void adamw_(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs, Tensors max_exp_avg_sqs,
            Tensors steps, double lr, double beta1, double beta2, double eps, double weight_decay,
            bool maximize, MaybeTensor lr_tensor, MaybeTensor beta1_tensor, MaybeTensor beta2_tensor,
            MaybeTensor grad_scale, MaybeTensor found_inf, Numbers geometries, Tensors bits, Numbers seeded,
            Tensors scores, Tensors cuts, std::string unselected, double rescale, Numbers rounding,
            MaybeTensor clock, Tensors statistics, Tensors nonfinite, std::string kind,
            Tensors statistic_scales) {
    const size_t count = params.size();
    check_length("grads", length(grads), count);
    check_length("exp_avgs", length(exp_avgs), count);
    check_length("exp_avg_sqs", length(exp_avg_sqs), count);
    check_optional_length("max_exp_avg_sqs", length(max_exp_avg_sqs), count);
    check_optional_length("scores", length(scores), count);
    check_optional_length("statistics", length(statistics), count);
    check_optional_length("statistic_scales", length(statistic_scales), count);
    check_geometries(geometries, count);
    Arrays arrays(params);
    const bool counts_there = steps_on_device(steps, lr_tensor);
    check_steps(arrays.place, steps, count, counts_there);
    if (!statistics.empty()) {
        check_length("nonfinite", nonfinite.size(), count);
    }
    const Selection selection(arrays.place, bits, seeded, clock, count);
    Draws rounds("rounding", rounding, count);
    count_by(arrays.place, clock, rounds.rule.draw);
    const AllNumbers numbers(arrays.place, lr, beta1, beta2, eps, weight_decay, maximize, lr_tensor,
                             beta1_tensor, beta2_tensor, grad_scale, found_inf);

    DenseCall call;
    call.stream = arrays.place.stream();
    call.hyper = numbers.here;
    call.on_device = numbers.there;
    call.rescale = rescale;
    call.unselected = unselected_of(unselected);
    call.seeded = selection.draws.rule;
    call.kind = kind_of(kind);
    call.rounds = rounds.given;
    call.rounding_seed = rounds.rule.seed;
    call.rounding_draw = rounds.rule.draw;
    std::optional<Cuts> all_cuts;
    if (!scores.empty()) {
        all_cuts.emplace(arrays, cuts, count);
    }
    for (size_t i = 0; i < count; ++i) {
        const Tensor& param = params[i];
        DenseTensor tensor;
        tensor.param = arrays.write("params", param);
        tensor.grad = arrays.read("grads", grads[i]);
        tensor.exp_avg = arrays.write("exp_avgs", exp_avgs[i]);
        tensor.exp_avg_sq = arrays.write("exp_avg_sqs", exp_avg_sqs[i]);
        check_shape("grads", grads[i], param);
        check_shape("exp_avgs", exp_avgs[i], param);
        check_shape("exp_avg_sqs", exp_avg_sqs[i], param);
        if (!max_exp_avg_sqs.empty()) {
            check_shape("max_exp_avg_sqs", max_exp_avg_sqs[i], param);
            tensor.largest = arrays.write("max_exp_avg_sqs", max_exp_avg_sqs[i]);
        }
        const int64_t numel = param.numel();
        const Geometry geometry = geometry_of(geometries, i, numel);
        tensor.mask = selection.mask(arrays, i, numel, geometry);
        if (!statistics.empty()) {
            check_shape("statistics", statistics[i], param);
            tensor.statistic = arrays.write("statistics", statistics[i]);
            tensor.nonfinite = flag_of(arrays.place, nonfinite[i]);
            if (!statistic_scales.empty()) {
                tensor.statistic_scale = number(arrays.place, "statistic_scales", statistic_scales[i]);
            }
        }
        if (!scores.empty() && tensor.mask.form == Form::kEverything && !selection.draws.given) {
            check_numel("scores", scores[i].numel(), numel);
            tensor.mask.form = Form::kScores;
            // scores that are the statistic of this very call are those after it
            const bool same = !statistics.empty() &&
                              scores[i].const_data_ptr() == statistics[i].const_data_ptr() &&
                              scores[i].scalar_type() == statistics[i].scalar_type();
            tensor.mask.scores = same ? tensor.statistic : arrays.read("scores", scores[i]);
            tensor.mask.cut = all_cuts->of(i, geometry, numel);
        }
        if (rounds.given) {
            tensor.rounding_key = rounds.keys[i];
        }
        // blocks that are whole tiles of random words, where there are such words
        tensor.draws =
            tensor.mask.form == Form::kSeeded || (rounds.given && tensor.param.dtype == Dtype::kBFloat16);
        tensor.lead = tensor.draws ? lead_of(geometry, numel) : 0;
        call.blocks.add(numel, tensor.lead);
        call.tensors.push_back(tensor);
    }
    if (count == 0 || numbers.skips()) {
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        call.tensors[i].step = next_step(arrays.place, steps[i], counts_there);
    }
    const Tensor derived =
        bytes_like(params[0], counts_there ? static_cast<int64_t>(count) * kNumbersBytes : 0);
    call.on_device.derived = counts_there ? derived.mutable_data_ptr() : nullptr;
    backend::adamw(call);
    arrays.finish();
}

void adamw_indexed_(Tensors params, Tensors grads, Tensors indices, Tensors exp_avgs, Tensors exp_avg_sqs,
                    Tensors max_exp_avg_sqs, Tensors masters, Tensors ages, Tensors steps, double lr,
                    double beta1, double beta2, double eps, double weight_decay, bool maximize,
                    MaybeTensor lr_tensor, MaybeTensor beta1_tensor, MaybeTensor beta2_tensor,
                    MaybeTensor grad_scale, MaybeTensor found_inf, bool compact_grads) {
    const size_t count = params.size();
    check_length("grads", length(grads), count);
    check_length("indices", length(indices), count);
    check_length("exp_avgs", length(exp_avgs), count);
    check_length("exp_avg_sqs", length(exp_avg_sqs), count);
    check_optional_length("max_exp_avg_sqs", length(max_exp_avg_sqs), count);
    check_optional_length("masters", length(masters), count);
    check_optional_length("ages", length(ages), count);
    Arrays arrays(params);
    const bool counts_there = steps_on_device(steps, lr_tensor);
    check_steps(arrays.place, steps, count, counts_there);
    const AllNumbers numbers(arrays.place, lr, beta1, beta2, eps, weight_decay, maximize, lr_tensor,
                             beta1_tensor, beta2_tensor, grad_scale, found_inf);

    IndexedCall call;
    call.stream = arrays.place.stream();
    call.hyper = numbers.here;
    call.on_device = numbers.there;
    call.compact_grads = compact_grads;
    for (size_t i = 0; i < count; ++i) {
        IndexedTensor tensor;
        tensor.numel = params[i].numel();
        tensor.param = arrays.write("params", params[i]);
        tensor.indices = indices_of(arrays, indices[i], tensor.numel);
        const int64_t listed = tensor.indices.count;
        tensor.grad = arrays.read("grads", grads[i]);
        check_numel("grads", grads[i].numel(), compact_grads ? listed : tensor.numel);
        const auto compact_state = [&](const char* name, const Tensor& state) {
            check_numel(name, state.numel(), listed);
            return arrays.write(name, state);
        };
        tensor.exp_avg = compact_state("exp_avgs", exp_avgs[i]);
        tensor.exp_avg_sq = compact_state("exp_avg_sqs", exp_avg_sqs[i]);
        if (!max_exp_avg_sqs.empty()) {
            tensor.largest = compact_state("max_exp_avg_sqs", max_exp_avg_sqs[i]);
        }
        if (!masters.empty()) {
            tensor.master = compact_state("masters", masters[i]);
            const Dtype needed = tensor.param.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
            STD_TORCH_CHECK(tensor.master.dtype == needed,
                            "masters must be float32, or float64 for float64 parameters, got another dtype; "
                            "convert them.");
        }
        if (!ages.empty()) {
            check_type("ages", ages[i], ScalarType::Int, "int32");
            check_numel("ages", ages[i].numel(), listed);
            tensor.ages = static_cast<int32_t*>(arrays.write_raw("ages", ages[i]));
        }
        call.blocks.add(listed);
        call.tensors.push_back(tensor);
    }
    arrays.check_indices_apart();
    if (count == 0 || numbers.skips()) {
        return;
    }
    for (size_t i = 0; i < count; ++i) {
        call.tensors[i].step = next_step(arrays.place, steps[i], counts_there);
    }
    const Tensor derived =
        bytes_like(params[0], counts_there ? static_cast<int64_t>(count) * kNumbersBytes : 0);
    call.on_device.derived = counts_there ? derived.mutable_data_ptr() : nullptr;
    backend::adamw_indexed(call);
    arrays.finish();
    check_indices_were_inside(call.bad_index);
}

void accumulate_(Tensors statistics, Tensors grads, Tensors nonfinite, std::string kind, Tensors grad_scales,
                 Tensors first_counts, bool absolute, Numbers rounding, Numbers geometries) {
    const size_t count = statistics.size();
    check_length("grads", length(grads), count);
    check_length("nonfinite", nonfinite.size(), count);
    check_optional_length("grad_scales", length(grad_scales), count);
    check_geometries(geometries, count);
    const Draws rounds("rounding", rounding, count);
    Arrays arrays(statistics);
    AccumulateCall call;
    call.stream = arrays.place.stream();
    call.kind = kind_of(kind);
    call.absolute = absolute;
    call.rounding_seed = rounds.rule.seed;
    call.rounding_draw = rounds.rule.draw;
    int64_t* counts = nullptr;
    size_t rows = 0;
    if (!first_counts.empty()) {
        const Tensor& target = first_counts[0];
        check_type("first_counts", target, ScalarType::Long, "int64");
        STD_TORCH_CHECK(target.dim() == 2 && target.size(1) == 1 << 11 &&
                            (target.size(0) == 1 || target.size(0) == static_cast<int64_t>(count)),
                        "first_counts must be [1, 2048] or [", count, ", 2048], got ", target.numel(),
                        " counts; pass zeros of that shape.");
        rows = static_cast<size_t>(target.size(0));
        counts = static_cast<int64_t*>(arrays.write_raw("first_counts", target));
    }
    for (size_t i = 0; i < count; ++i) {
        check_shape("grads", grads[i], statistics[i]);
        AccumulateTensor tensor;
        tensor.numel = statistics[i].numel();
        tensor.statistic = arrays.write("statistics", statistics[i]);
        tensor.grad = arrays.read("grads", grads[i]);
        if (!grad_scales.empty()) {
            tensor.scale = number(arrays.place, "grad_scales", grad_scales[i]);
        }
        tensor.nonfinite = flag_of(arrays.place, nonfinite[i]);
        if (counts != nullptr) {
            tensor.counts = counts + (rows == 1 ? 0 : i) * (1 << 11);
        }
        tensor.geometry = geometry_of(geometries, i, tensor.numel);
        tensor.rounds = rounds.given && tensor.statistic.dtype == Dtype::kBFloat16;
        if (tensor.rounds) {
            tensor.rounding_key = rounds.keys[i];
            tensor.lead = lead_of(tensor.geometry, tensor.numel);
        }
        call.blocks.add(tensor.numel, tensor.lead);
        call.tensors.push_back(tensor);
    }
    backend::accumulate(call);
    arrays.finish();
}

Tensor histogram(Tensors scores, int64_t shift, int64_t width, Tensor prefixes, bool per_tensor,
                 bool absolute, Tensors ties, Numbers geometries) {
    const size_t count = scores.size();
    STD_TORCH_CHECK(width >= 0 && width <= 11, "width must be in [0, 11], got ", width,
                    "; count in several rounds.");
    STD_TORCH_CHECK(shift >= 0 && shift <= 63 - width, "shift must be in [0, 63 - width], got ", shift,
                    "; keys have 32 bits and indices at most 63.");
    check_geometries(geometries, count);
    Arrays arrays(scores);
    const int64_t* const all_prefixes = arrays.read_integers("prefixes", prefixes, count);
    const int64_t* const all_ties = ties.empty() ? nullptr : arrays.read_integers("ties", ties[0], count);
    const int64_t rows = per_tensor ? static_cast<int64_t>(count) : 1;
    Tensor counts = torch::stable::new_zeros(prefixes, {rows, int64_t{1} << width}, ScalarType::Long);
    int64_t* const data = static_cast<int64_t*>(counts.mutable_data_ptr());

    HistogramCall call;
    call.stream = arrays.place.stream();
    call.shift = static_cast<int>(shift);
    call.width = static_cast<int>(width);
    call.absolute = absolute;
    call.among_ties = all_ties != nullptr;
    for (size_t i = 0; i < count; ++i) {
        HistogramTensor tensor;
        tensor.numel = scores[i].numel();
        tensor.scores = arrays.read("scores", scores[i]);
        tensor.geometry = geometry_of(geometries, i, tensor.numel);
        tensor.prefix = all_prefixes + i;
        tensor.tie = call.among_ties ? all_ties + i : nullptr;
        tensor.counts = data + (per_tensor ? static_cast<int64_t>(i) << width : 0);
        call.blocks.add(tensor.numel);
        call.tensors.push_back(tensor);
    }
    backend::histogram(call);
    return counts;
}

Tensors compact(Tensors scores, Tensors cuts, bool as_bits, bool absolute, Numbers geometries) {
    const size_t count = scores.size();
    check_geometries(geometries, count);
    Arrays arrays(scores);
    const Cuts all_cuts(arrays, cuts, count);
    CompactCall call;
    call.stream = arrays.place.stream();
    call.absolute = absolute;
    for (size_t i = 0; i < count; ++i) {
        CompactTensor tensor;
        tensor.mask.form = Form::kScores;
        tensor.mask.numel = scores[i].numel();
        tensor.mask.scores = arrays.read("scores", scores[i]);
        tensor.mask.geometry = geometry_of(geometries, i, tensor.mask.numel);
        tensor.mask.cut = all_cuts.of(i, tensor.mask.geometry, tensor.mask.numel);
        call.blocks.add(tensor.mask.numel);
        call.tensors.push_back(tensor);
    }
    Tensors results;
    if (count == 0) {
        return results;
    }
    Numbers listed(count);
    Tensor places;
    if (!as_bits) {
        // the totals come first, because they go to the host
        const int64_t needed = static_cast<int64_t>(count) + backend::places_of(call);
        places = torch::stable::new_empty(scores[0], {needed}, ScalarType::Long);
        call.totals = static_cast<int64_t*>(places.mutable_data_ptr());
        call.places = call.totals + count;
        backend::count_selected(call);
        const Tensor totals = on_host(torch::stable::narrow(places, 0, 0, static_cast<int64_t>(count)));
        std::copy_n(totals.const_data_ptr<int64_t>(), count, listed.begin());
    }
    for (size_t i = 0; i < count; ++i) {
        CompactTensor& tensor = call.tensors[i];
        const int64_t numel = tensor.mask.numel;
        if (as_bits) {
            results.push_back(bytes_like(scores[i], (numel + 31) / 32 * 4));
            tensor.bits = static_cast<uint8_t*>(results.back().mutable_data_ptr());
        } else {
            tensor.is_64_bit = numel > std::numeric_limits<int32_t>::max();
            results.push_back(torch::stable::new_empty(
                scores[i], {listed[i]}, tensor.is_64_bit ? ScalarType::Long : ScalarType::Int));
            tensor.indices = results.back().mutable_data_ptr();
        }
    }
    backend::compact(call);
    return results;
}

void gather_(Tensors buffers, Tensors tensors, Tensors indices) {
    const size_t count = buffers.size();
    check_length("tensors", length(tensors), count);
    check_length("indices", length(indices), count);
    Arrays arrays(buffers);
    GatherCall call;
    call.stream = arrays.place.stream();
    for (size_t i = 0; i < count; ++i) {
        GatherTensor tensor;
        tensor.numel = tensors[i].numel();
        tensor.indices = indices_of(arrays, indices[i], tensor.numel);
        check_numel("buffers", buffers[i].numel(), tensor.indices.count);
        tensor.buffer = arrays.write("buffers", buffers[i]);
        STD_TORCH_CHECK(bytes_of(tensor.buffer.dtype) >= 4,
                        "buffers must be float32 or float64, got another dtype; convert them.");
        tensor.tensor = arrays.read("tensors", tensors[i]);
        call.blocks.add(tensor.indices.count);
        call.tensors.push_back(tensor);
    }
    arrays.check_indices_apart();
    backend::gather(call);
    arrays.finish();
    check_indices_were_inside(call.bad_index);
}

Tensor norm(Tensors grads, Tensors indices, Numbers geometries, Tensors bits, Numbers seeded,
            MaybeTensor clock) {
    const size_t count = grads.size();
    check_optional_length("indices", length(indices), count);
    check_geometries(geometries, count);
    Arrays arrays(grads);
    const Selection selection(arrays.place, bits, seeded, clock, count);
    NormCall call;
    call.stream = arrays.place.stream();
    call.indexed = !indices.empty();
    call.seeded = selection.draws.rule;
    for (size_t i = 0; i < count; ++i) {
        NormTensor tensor;
        const int64_t numel = grads[i].numel();
        const Geometry geometry = geometry_of(geometries, i, numel);
        tensor.mask = selection.mask(arrays, i, numel, geometry);
        tensor.grad = arrays.read("grads", grads[i]);
        if (call.indexed) {
            tensor.indices = indices_of(arrays, indices[i], numel);
            call.blocks.add(tensor.indices.count);
        } else {
            tensor.lead = tensor.mask.form == Form::kSeeded ? lead_of(geometry, numel) : 0;
            // nothing to read where nothing is selected
            call.blocks.add(tensor.mask.form == Form::kNothing ? 0 : numel, tensor.lead);
        }
        call.tensors.push_back(tensor);
    }
    STD_TORCH_CHECK(count != 0, "grads must not be empty, got none; pass at least one.");
    const Tensor total = torch::stable::new_empty(grads[0], {}, ScalarType::Double);
    const Tensor sums = torch::stable::new_empty(grads[0], {backend::sums_of(call)}, ScalarType::Double);
    call.total = static_cast<double*>(total.mutable_data_ptr());
    call.sums = static_cast<double*>(sums.mutable_data_ptr());
    backend::norm(call);
    check_indices_were_inside(call.bad_index);
    return total;
}

void apply_delta_(Tensors params, Tensors indices, Tensors values, std::string mode) {
    const size_t count = params.size();
    check_length("indices", length(indices), count);
    check_length("values", length(values), count);
    STD_TORCH_CHECK(mode == "replace" || mode == "add" || mode == "xor",
                    "mode must be 'replace', 'add' or 'xor', got '", mode, "'; use 'replace'.");
    Arrays arrays(params);
    DeltaCall call;
    call.stream = arrays.place.stream();
    call.mode = mode == "replace" ? Mode::kReplace : mode == "add" ? Mode::kAdd : Mode::kXor;
    for (size_t i = 0; i < count; ++i) {
        DeltaTensor tensor;
        tensor.numel = params[i].numel();
        tensor.param = arrays.write("params", params[i]);
        tensor.indices = indices_of(arrays, indices[i], tensor.numel);
        tensor.values = arrays.read("values", values[i]);
        check_numel("values", values[i].numel(), tensor.indices.count);
        STD_TORCH_CHECK(tensor.values.dtype == tensor.param.dtype,
                        "values must have the dtype of their parameter, got another; convert them.");
        call.blocks.add(tensor.indices.count);
        call.tensors.push_back(tensor);
    }
    arrays.check_indices_apart();
    backend::apply_delta(call);
    arrays.finish();
    check_indices_were_inside(call.bad_index);
}

#if defined(SPARSE_OPTIM_ON_GPU)

std::string gpu_problem(int64_t gpu) {
    if (aoti_torch_get_current_cuda_stream == nullptr) {
        return "torch is not a CUDA build";
    }
    return cuda::problem(static_cast<int32_t>(gpu));
}

#elif !defined(SPARSE_OPTIM_CUDA)

// All levels of vector instructions give the same bits: these two are there to test that.
std::string vector_levels() {
    std::string names;
    for (const std::string& name : cpu::levels()) {
        names += names.empty() ? name : "," + name;
    }
    return names;
}

void use_vector_level(std::string level) {
    STD_TORCH_CHECK(cpu::use_level(level), "level must be one of ", vector_levels(), ", got '", level,
                    "'; this machine has no other.");
}

#endif

}  // namespace
}  // namespace sparse_optim

namespace {

template <typename Library>
void define_verbs(Library& library) {
    // an empty list stands for an argument that is not given; seeded and rounding are seed, draw, threshold,
    // one_word and the keys, the number of both draws on top is in `clock`; cuts are keys and last_ties; a
    // number given as a tensor stays on its device
    library.def(
        "adamw_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, float beta1, float beta2, float eps, "
        "float weight_decay, bool maximize, Tensor? lr_tensor, Tensor? beta1_tensor, Tensor? beta2_tensor, "
        "Tensor? grad_scale, Tensor? found_inf, int[] geometries, Tensor[] bits, int[] seeded, "
        "Tensor[] scores, Tensor[] cuts, str unselected, float rescale, int[] rounding, Tensor? clock, "
        "Tensor(f!)[] statistics, Tensor(g!)[] nonfinite, str kind, Tensor[] statistic_scales) -> ()");
    library.def(
        "adamw_indexed_(Tensor(a!)[] params, Tensor[] grads, Tensor[] indices, Tensor(b!)[] exp_avgs, "
        "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] masters, Tensor(f!)[] ages, "
        "Tensor(g!)[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, "
        "bool maximize, Tensor? lr_tensor, Tensor? beta1_tensor, Tensor? beta2_tensor, Tensor? grad_scale, "
        "Tensor? found_inf, bool compact_grads) -> ()");
    library.def(
        "accumulate_(Tensor(a!)[] statistics, Tensor[] grads, Tensor(b!)[] nonfinite, str kind, "
        "Tensor[] grad_scales, Tensor(c!)[] first_counts, bool absolute, int[] rounding, int[] geometries) "
        "-> ()");
    library.def(
        "histogram(Tensor[] scores, int shift, int width, Tensor prefixes, bool per_tensor, bool absolute, "
        "Tensor[] ties, int[] geometries) -> Tensor");
    library.def(
        "compact(Tensor[] scores, Tensor[] cuts, bool as_bits, bool absolute, int[] geometries) -> Tensor[]");
    library.def("gather_(Tensor(a!)[] buffers, Tensor[] tensors, Tensor[] indices) -> ()");
    library.def(
        "norm(Tensor[] grads, Tensor[] indices, int[] geometries, Tensor[] bits, int[] seeded, "
        "Tensor? clock) -> Tensor");
    library.def("apply_delta_(Tensor(a!)[] params, Tensor[] indices, Tensor[] values, str operation) -> ()");
}

template <typename Library>
void implement_verbs(Library& library) {
    library.impl("adamw_", TORCH_BOX(&sparse_optim::adamw_));
    library.impl("adamw_indexed_", TORCH_BOX(&sparse_optim::adamw_indexed_));
    library.impl("accumulate_", TORCH_BOX(&sparse_optim::accumulate_));
    library.impl("histogram", TORCH_BOX(&sparse_optim::histogram));
    library.impl("compact", TORCH_BOX(&sparse_optim::compact));
    library.impl("gather_", TORCH_BOX(&sparse_optim::gather_));
    library.impl("norm", TORCH_BOX(&sparse_optim::norm));
    library.impl("apply_delta_", TORCH_BOX(&sparse_optim::apply_delta_));
}

}  // namespace

#if defined(SPARSE_OPTIM_EMULATED)

STABLE_TORCH_LIBRARY(sparse_optim_emulated, library) {
    define_verbs(library);
}

STABLE_TORCH_LIBRARY_IMPL(sparse_optim_emulated, CPU, library) {
    implement_verbs(library);
}

#elif defined(SPARSE_OPTIM_CUDA)

STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CUDA, library) {
    implement_verbs(library);
}

STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CompositeExplicitAutograd, library) {
    library.impl("gpu_problem", TORCH_BOX(&sparse_optim::gpu_problem));
}

#else

STABLE_TORCH_LIBRARY(sparse_optim, library) {
    library.def("philox_words(int seed, int draw, int key, int start, int count) -> Tensor");
    library.def("gpu_problem(int gpu) -> str");
    library.def("vector_levels() -> str");
    library.def("use_vector_level(str level) -> ()");
    define_verbs(library);
}

// no tensor goes in, so no device can be read off the arguments: the kernel is the one for every device, and
// its result lies on the CPU
STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CompositeExplicitAutograd, library) {
    library.impl("philox_words", TORCH_BOX(&sparse_optim::philox_words));
    library.impl("vector_levels", TORCH_BOX(&sparse_optim::vector_levels));
    library.impl("use_vector_level", TORCH_BOX(&sparse_optim::use_vector_level));
}

STABLE_TORCH_LIBRARY_IMPL(sparse_optim, CPU, library) {
    implement_verbs(library);
}

#endif

// A library is loaded by path, but it is installed as a Python module, and such a module has this function.
#if defined(SPARSE_OPTIM_CUDA)
#define SPARSE_OPTIM_MODULE "_cuda"
#define SPARSE_OPTIM_INIT PyInit__cuda
#else
#define SPARSE_OPTIM_MODULE "_C"
#define SPARSE_OPTIM_INIT PyInit__C
#endif
PyMODINIT_FUNC SPARSE_OPTIM_INIT() {
    static PyModuleDef module = {
        PyModuleDef_HEAD_INIT, SPARSE_OPTIM_MODULE, nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};
    return PyModule_Create(&module);
}
