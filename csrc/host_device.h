// How a function that runs on the CPU and on the GPU is declared.

#pragma once

#if defined(__CUDACC__) || defined(__HIPCC__)
#define SPARSE_OPTIM_HOST_DEVICE __host__ __device__ __forceinline__
#elif defined(__GNUC__)
// inlined always: a loop over entries is vectorised only when nothing in it is a call
#define SPARSE_OPTIM_HOST_DEVICE inline __attribute__((always_inline))
#else
#define SPARSE_OPTIM_HOST_DEVICE inline
#endif
