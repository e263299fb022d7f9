// A GPU on the CPU, for tests: csrc/cuda is compiled against this header by a C++ compiler, and its kernels run
// block after block. The threads of a block are contexts that take turns: each runs until it waits for the
// others or ends. Which of two threads comes first is drawn anew at every turn, so that code that needs an order
// and does not ask for one is found out.

#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
// one block runs at a time
#define __shared__ static

namespace sparse_optim::cuda {

struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};

inline void __stwb(uint4* target, uint4 value) {
    std::memcpy(target, &value, sizeof value);
}

struct Dimension {
    uint32_t x = 0;
};
inline Dimension threadIdx, blockIdx, blockDim, gridDim;

class Block {
  public:
    explicit Block(uint32_t threads) : contexts_(threads), ended_(threads) {
        while (stacks().size() < threads) {
            stacks().push_back(std::make_unique<char[]>(kStackBytes));
        }
    }

    // true if a thread has trapped
    bool run(void (*body)(const void*), const void* args) {
        current_ = this;
        body_ = body;
        args_ = args;
        const auto threads = static_cast<uint32_t>(contexts_.size());
        for (uint32_t thread = 0; thread < threads; ++thread) {
            ended_[thread] = false;
            getcontext(&contexts_[thread]);
            contexts_[thread].uc_stack.ss_sp = stacks()[thread].get();
            contexts_[thread].uc_stack.ss_size = kStackBytes;
            contexts_[thread].uc_link = nullptr;
            makecontext(&contexts_[thread], &Block::enter, 0);
        }
        for (uint32_t left = threads; left != 0;) {
            // all run up to the next barrier, in an order that starts somewhere and may go backwards
            const auto random = order_();
            const uint32_t start = random / 2 % threads, waiting = left;
            waited_ = 0;
            for (uint32_t i = 0; i < threads; ++i) {
                thread_ = random % 2 ? (start + i) % threads : (start + threads - i) % threads;
                if (!ended_[thread_]) {
                    threadIdx.x = thread_;
                    swapcontext(&scheduler_, &contexts_[thread_]);
                    left -= ended_[thread_];
                }
            }
            // on a GPU, a barrier that some threads do not reach is undefined
            if (waited_ != 0 && waited_ != waiting) {
                throw std::logic_error("not all threads of a block have reached a barrier");
            }
        }
        return trapped_;
    }

    static void wait() {
        Block& block = *current_;
        ++block.waited_;
        const uint32_t thread = block.thread_;
        swapcontext(&block.contexts_[thread], &block.scheduler_);
    }
    static void trap() {
        current_->trapped_ = true;
        end();
    }

  private:
    static constexpr size_t kStackBytes = 128 * 1024;

    static void enter() {
        current_->body_(current_->args_);
        end();
    }
    static void end() {
        Block& block = *current_;
        block.ended_[block.thread_] = true;
        swapcontext(&block.contexts_[block.thread_], &block.scheduler_);
    }
    static std::vector<std::unique_ptr<char[]>>& stacks() {
        static std::vector<std::unique_ptr<char[]>> all;
        return all;
    }

    static inline Block* current_ = nullptr;
    static inline std::minstd_rand order_{1};
    std::vector<ucontext_t> contexts_;
    std::vector<bool> ended_;
    ucontext_t scheduler_;
    void (*body_)(const void*) = nullptr;
    const void* args_ = nullptr;
    uint32_t thread_ = 0, waited_ = 0;
    bool trapped_ = false;
};

inline void __syncthreads() {
    Block::wait();
}

[[noreturn]] inline void __trap() {
    Block::trap();
    __builtin_unreachable();
}

template <typename T>
inline T atomicAdd(T* address, T value) {
    const T before = *address;
    *address += value;
    return before;
}

inline int __popc(uint32_t word) {
    return __builtin_popcount(word);
}

// Types that name the kernel of a launch, which must be a plain function of its one argument.
template <typename Args>
struct Launch {
    void (*kernel)(Args);
    const Args* args;
    static void body(const void* launch) {
        const auto* self = static_cast<const Launch*>(launch);
        self->kernel(*self->args);
    }
};

template <typename Args>
void launch(void (*kernel)(Args), uint32_t blocks, uint32_t threads, void*, const Args& args) {
    static std::mutex one_at_a_time;
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const Launch<Args> work = {kernel, &args};
    gridDim.x = blocks;
    blockDim.x = threads;
    bool trapped = false;
    Block block(threads);
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        trapped |= block.run(&Launch<Args>::body, &work);
    }
    if (trapped) {
        throw std::runtime_error("a kernel has trapped");
    }
}

template <typename Args>
std::string problem_of(void (*)(Args), int32_t) {
    return "";
}

}  // namespace sparse_optim::cuda
