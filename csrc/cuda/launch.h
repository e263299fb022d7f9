// How a kernel is started. The tests start them on the CPU: there, cuda_on_cpu.h stands in for the GPU.

#pragma once

#if defined(SPARSE_OPTIM_EMULATED)

#include "cuda_on_cpu.h"

#else

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace sparse_optim::cuda {

template <typename Args>
void launch(void (*kernel)(Args), uint32_t blocks, uint32_t threads, void* stream, const Args& args) {
    void* arguments[] = {const_cast<Args*>(&args)};
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments, 0,
                         static_cast<cudaStream_t>(stream));
    if (error != cudaSuccess) {
        cudaGetLastError();  // else torch would find it once more
        throw std::runtime_error(std::string("a CUDA kernel of sparse_optim does not start: ") +
                                 cudaGetErrorString(error) +
                                 "; `python -m sparse_optim` says whether it can run on this GPU.");
    }
}

// Why a kernel cannot run on a GPU; empty when it can. The current GPU stays what it is.
template <typename Args>
std::string problem_of(void (*kernel)(Args), int32_t gpu) {
    int current = 0;
    cudaError_t error = cudaGetDevice(&current);
    if (error == cudaSuccess && (error = cudaSetDevice(gpu)) == cudaSuccess) {
        cudaFuncAttributes attributes;
        error = cudaFuncGetAttributes(&attributes, kernel);
        cudaSetDevice(current);
    }
    cudaGetLastError();  // else torch would find it
    return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

}  // namespace sparse_optim::cuda

#endif
