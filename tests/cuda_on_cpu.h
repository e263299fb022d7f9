// A GPU on the CPU, for tests: csrc/cuda is compiled against this header by a C++ compiler, and its kernels run
// block after block. The threads of a block are contexts that take turns: each runs until it waits for the
// others or ends. Which of two blocks or threads comes first is drawn anew at every launch and at every turn, so
// that code that needs an order and does not ask for one is found out.

#pragma once

#include <ucontext.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <source_location>
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

// An order of some blocks or threads: it starts anywhere, and may go backwards.
class Order {
  public:
    explicit Order(uint32_t count) : count_(count) {
        const auto random = random_();
        start_ = random / 2 % count;
        forwards_ = random % 2;
    }
    uint32_t at(uint32_t i) const {
        return static_cast<uint32_t>((uint64_t{start_} + (forwards_ ? i : count_ - i)) % count_);
    }

  private:
    static inline std::minstd_rand random_{1};
    uint32_t count_, start_;
    bool forwards_;
};

// A thread's stack, and where on it the thread waits. Stacks outlive blocks: to make one takes far longer than to
// go there and back.
struct Thread {
    static constexpr size_t kStackBytes = 128 * 1024;
    std::unique_ptr<char[]> stack = std::make_unique<char[]>(kStackBytes);
    std::jmp_buf place;
    bool started = false, ended = false;
};

class Block {
  public:
    explicit Block(uint32_t threads) : count_(threads) {
        while (threads_.size() < threads) {
            threads_.push_back(std::make_unique<Thread>());
        }
    }
    // those that wait amid a kernel that goes no further
    ~Block() {
        for (const auto& thread : threads_) {
            thread->started = thread->started && thread->ended;
        }
    }

    // true if a thread has trapped
    bool run(void (*body)(const void*), const void* args) {
        current_ = this;
        body_ = body;
        args_ = args;
        for (uint32_t thread = 0; thread < count_; ++thread) {
            threads_[thread]->ended = false;
        }
        for (uint32_t left = count_; left != 0;) {
            // all run up to the next barrier
            const Order order(count_);
            const uint32_t waiting = left;
            waited_ = 0;
            for (uint32_t i = 0; i < count_; ++i) {
                thread_ = order.at(i);
                if (!threads_[thread_]->ended) {
                    threadIdx.x = thread_;
                    go_on(*threads_[thread_]);
                    left -= threads_[thread_]->ended;
                }
            }
            // a trap ends all threads, wherever they wait
            if (trapped_) {
                return true;
            }
            // on a GPU, a barrier that some threads do not reach is undefined
            if (elsewhere_ || (waited_ != 0 && waited_ != waiting)) {
                throw std::logic_error("not all threads of a block have reached a barrier");
            }
        }
        return false;
    }

    static void wait(uint32_t line) {
        Block& block = *current_;
        if (block.waited_++ != 0 && block.line_ != line) {
            block.elsewhere_ = true;
        }
        block.line_ = line;
        go_back();
    }
    [[noreturn]] static void trap() {
        current_->trapped_ = true;
        // its stack is that of a kernel which goes no further
        Thread& thread = *threads_[current_->thread_];
        thread.started = false;
        thread.ended = true;
        _longjmp(scheduler_, 1);
    }

  private:
    static void enter() {
        for (;;) {
            current_->body_(current_->args_);
            threads_[current_->thread_]->ended = true;
            go_back();
        }
    }
    // functions of their own: whoever returns twice must not keep anything in registers
    [[gnu::noinline]] static void go_on(Thread& thread) {
        if (_setjmp(scheduler_) != 0) {
            return;
        }
        if (thread.started) {
            _longjmp(thread.place, 1);
        }
        thread.started = true;
#ifdef __SANITIZE_ADDRESS__
        // a kernel that went no further has left its frames there
        __asan_unpoison_memory_region(thread.stack.get(), Thread::kStackBytes);
#endif
        ucontext_t context;
        getcontext(&context);
        context.uc_stack.ss_sp = thread.stack.get();
        context.uc_stack.ss_size = Thread::kStackBytes;
        context.uc_link = nullptr;
        makecontext(&context, &Block::enter, 0);
        setcontext(&context);
    }
    [[gnu::noinline]] static void go_back() {
        if (_setjmp(threads_[current_->thread_]->place) == 0) {
            _longjmp(scheduler_, 1);
        }
    }

    static inline Block* current_ = nullptr;
    static inline std::vector<std::unique_ptr<Thread>> threads_;
    static inline std::jmp_buf scheduler_;
    const uint32_t count_;
    void (*body_)(const void*) = nullptr;
    const void* args_ = nullptr;
    uint32_t thread_ = 0, waited_ = 0, line_ = 0;
    bool trapped_ = false, elsewhere_ = false;
};

inline void __syncthreads(std::source_location place = std::source_location::current()) {
    Block::wait(place.line());
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

// all kernels share threadIdx and the stacks
inline std::mutex one_at_a_time;

template <typename Args>
void launch(void (*kernel)(Args), uint32_t blocks, uint32_t threads, void*, const Args& args) {
    const std::lock_guard<std::mutex> lock(one_at_a_time);
    const Launch<Args> work = {kernel, &args};
    gridDim.x = blocks;
    blockDim.x = threads;
    bool trapped = false;
    const Order order(blocks);
    for (uint32_t i = 0; i < blocks && !trapped; ++i) {
        blockIdx.x = order.at(i);
        trapped = Block(threads).run(&Launch<Args>::body, &work);
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
