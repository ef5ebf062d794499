// A function on a stack of its own that may stop in the middle and go on later. Every CUDA thread
// of the emulator is one: a block of hundreds of them runs on one thread of the operating system,
// in an order that the emulator chooses.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(SIMT_USE_UCONTEXT)
#define SIMT_UCONTEXT 1
#include <ucontext.h>
#else
#define SIMT_UCONTEXT 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define SIMT_ASAN 0
#endif

#if !SIMT_UCONTEXT
// Saves the registers that a call keeps and the stack pointer, and takes those of another stack.
// ucontext would do, but asks the kernel for the signal mask each time, which costs 20 times more.
extern "C" void simt_switch_stack(void** save, void* load);
asm(R"(
.pushsection .text
.weak simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch_stack, .-simt_switch_stack
.popsection
)");
#endif

namespace simt {

// Stacks for a block of threads, each above a page that may not be touched, so that an overflow is
// a fault at once. The next block of the process that is as large takes them over: their pages are
// there, and the kernel of the operating system keeps a mapping for each page between them.
class Stacks {
 public:
  Stacks(int count, size_t bytes) : count_(count), bytes_(round_up(bytes)) {
    {
      const std::lock_guard lock(pool().mutex);
      std::vector<uint8_t*>& free = pool().free[{count_, bytes_}];
      if (!free.empty()) {
        memory_ = free.back();
        free.pop_back();
        return;
      }
    }
    void* memory = mmap(nullptr, total(), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<uint8_t*>(memory);
    for (int i = 0; i < count; ++i) {
      if (mprotect(memory_ + i * (bytes_ + kPage), kPage, PROT_NONE) != 0) throw std::bad_alloc();
    }
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks() {
#if SIMT_ASAN
    __asan_unpoison_memory_region(memory_, total());
#endif
    const std::lock_guard lock(pool().mutex);
    pool().free[{count_, bytes_}].push_back(memory_);
  }

  uint8_t* operator[](int i) const { return memory_ + i * (bytes_ + kPage) + kPage; }
  size_t bytes() const { return bytes_; }

 private:
  struct Pool {
    std::mutex mutex;
    std::map<std::pair<int, size_t>, std::vector<uint8_t*>> free;  // by count and bytes
  };
  static Pool& pool() {
    static Pool pool;
    return pool;
  }

  static constexpr size_t kPage = 4096;
  static size_t round_up(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }
  size_t total() const { return static_cast<size_t>(count_) * (bytes_ + kPage); }

  int count_;
  size_t bytes_;
  uint8_t* memory_;
};

class Fiber {
 public:
  using Entry = void (*)(void*);

  // The next resume() calls entry(argument) on the stack. A fiber may be started again, after it
  // has finished or was given up in the middle.
  void start(uint8_t* stack, size_t bytes, Entry entry, void* argument) {
    stack_ = stack;
    stack_bytes_ = bytes;
    entry_ = entry;
    argument_ = argument;
    finished_ = false;
#if SIMT_ASAN
    __asan_unpoison_memory_region(stack, bytes);  // of the frames that were there before
    fake_stack_ = nullptr;
#endif
#if SIMT_UCONTEXT
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack;
    context_.uc_stack.ss_size = bytes;
    context_.uc_link = nullptr;
    makecontext(&context_, main, 0);
#else
    // As simt_switch_stack leaves it: six registers, then where to return to. The word above stands
    // for main's return address; with it the stack is aligned as at any call.
    auto** top = reinterpret_cast<void**>(stack + bytes);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(main);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    stack_pointer_ = top;
#endif
  }

  // Runs the fiber until it suspends or finishes.
  void resume() {
    entering = this;
#if SIMT_ASAN
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, stack_, stack_bytes_);
#endif
#if SIMT_UCONTEXT
    swapcontext(&caller_context_, &context_);
#else
    simt_switch_stack(&caller_stack_pointer_, stack_pointer_);
#endif
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  }

  // Back to the caller of resume(). Called inside the fiber.
  void suspend() {
#if SIMT_ASAN
    // A null pointer tells that this stack is done with.
    __sanitizer_start_switch_fiber(finished_ ? nullptr : &fake_stack_, caller_stack_,
                                   caller_stack_bytes_);
#endif
#if SIMT_UCONTEXT
    swapcontext(&context_, &caller_context_);
#else
    simt_switch_stack(&stack_pointer_, caller_stack_pointer_);
#endif
    entered();
  }

  bool finished() const { return finished_; }

 private:
  void entered() {
#if SIMT_ASAN
    __sanitizer_finish_switch_fiber(fake_stack_, &caller_stack_, &caller_stack_bytes_);
#endif
  }

  static void main() {
    Fiber* fiber = entering;
    fiber->entered();
    fiber->entry_(fiber->argument_);
    fiber->finished_ = true;
    fiber->suspend();
    std::abort();  // a finished fiber is not resumed
  }

  static inline constinit thread_local Fiber* entering = nullptr;

  uint8_t* stack_ = nullptr;
  size_t stack_bytes_ = 0;
  Entry entry_ = nullptr;
  void* argument_ = nullptr;
  bool finished_ = true;
#if SIMT_UCONTEXT
  ucontext_t context_, caller_context_;
#else
  void* stack_pointer_ = nullptr;
  void* caller_stack_pointer_ = nullptr;
#endif
#if SIMT_ASAN
  void* fake_stack_ = nullptr;
  const void* caller_stack_ = nullptr;
  size_t caller_stack_bytes_ = 0;
#endif
};

}  // namespace simt
