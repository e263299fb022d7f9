// The operators for CUDA tensors: those of ops.cpp, with the kernels of this directory.

#define SPARSE_OPTIM_CUDA
#include "../ops.cpp"
