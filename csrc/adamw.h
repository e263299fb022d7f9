// AdamW on one entry, compiled for the CPU and for the GPU from this text.
//
// The equation and its order of operations are those of sparse_optim/backends/reference.py, _adamw_entries.
// Every multiplication, addition, division and square root is rounded on its own: compile with
// -ffp-contract=off, or nvcc's -fmad=false.

#pragma once

#include <cmath>

#include "host_device.h"

namespace sparse_optim {

// What all entries of a call share, computed in double and rounded once into T, the type of the arithmetic.
template <typename T>
struct AdamwScalars {
    T decay;           // 1 - lr * weight_decay
    T average_weight;  // of grad - exp_avg: 1 - beta1 seen from exp_avg, or -beta1 seen from grad
    bool from_grad;    // which of the two: the end that is nearer, as in torch's lerp
    T beta2;
    T square_weight;  // 1 - beta2
    T eps;
};

// What all entries of one age share.
template <typename T>
struct BiasCorrection {
    T minus_step_size;    // -lr / (1 - beta1^step)
    T square_correction;  // sqrt(1 - beta2^step)
};

template <typename T>
SPARSE_OPTIM_HOST_DEVICE AdamwScalars<T> adamw_scalars(double lr, double beta1, double beta2, double eps,
                                                       double weight_decay) {
    const T weight = static_cast<T>(1 - beta1);
    const bool from_grad = !(weight < T(0.5));
    return {static_cast<T>(1 - lr * weight_decay),
            from_grad ? weight - T(1) : weight,
            from_grad,
            static_cast<T>(beta2),
            static_cast<T>(1 - beta2),
            static_cast<T>(eps)};
}

template <typename T>
BiasCorrection<T> bias_correction(double lr, double beta1, double beta2, double step) {
    // pow rather than sqrt: the reference writes ** 0.5
    return {static_cast<T>(-(lr / (1 - std::pow(beta1, step)))),
            static_cast<T>(std::pow(1 - std::pow(beta2, step), 0.5))};
}

// base to a whole power, by repeated squaring: on a GPU, pow costs many times as much, for each entry that
// has an age of its own.
SPARSE_OPTIM_HOST_DEVICE double power(double base, int32_t exponent) {
    double result = 1;
    for (uint32_t rest = static_cast<uint32_t>(exponent); rest != 0; rest >>= 1) {
        result = rest & 1 ? result * base : result;
        base = base * base;
    }
    return result;
}

// `bias_correction` as a GPU computes it.
template <typename T>
SPARSE_OPTIM_HOST_DEVICE BiasCorrection<T> bias_correction_by_squaring(double lr, double beta1, double beta2,
                                                                       int32_t step) {
    return {static_cast<T>(-(lr / (1 - power(beta1, step)))),
            static_cast<T>(std::sqrt(1 - power(beta2, step)))};
}

// The new values of one entry. `largest` is the largest exp_avg_sq so far, and is used with kAmsgrad only.
template <bool kAmsgrad, typename T>
SPARSE_OPTIM_HOST_DEVICE void adamw_entry(T& param, T grad, T& exp_avg, T& exp_avg_sq, T& largest,
                                          const AdamwScalars<T>& scalars, T minus_step_size,
                                          T square_correction) {
    param = param * scalars.decay;
    exp_avg = (scalars.from_grad ? grad : exp_avg) + scalars.average_weight * (grad - exp_avg);
    exp_avg_sq = exp_avg_sq * scalars.beta2 + scalars.square_weight * grad * grad;
    T square = exp_avg_sq;
    if constexpr (kAmsgrad) {
        // a NaN on either side stays, as in torch.maximum
        largest = largest > exp_avg_sq || largest != largest ? largest : exp_avg_sq;
        square = largest;
    }
    const T denominator = std::sqrt(square) / square_correction + scalars.eps;
    param = param + minus_step_size * exp_avg / denominator;
}

}  // namespace sparse_optim
