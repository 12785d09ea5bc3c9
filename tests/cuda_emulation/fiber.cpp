#include "cuda_emulation/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <cstdint>
#include <new>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace nb::emulation {

namespace {

constexpr std::size_t kStackBytes = 160 << 10;

// Stacks begin at different places of their pages: at the same one all would want the same few lines of the processor's
// caches, and every switch would miss them.
std::size_t offset_of(int fiber) { return static_cast<std::size_t>(fiber) * 832 % (32 << 10); }

}  // namespace

struct FiberPool::Fiber {
  explicit Fiber(int number) : index(number) {
    stack = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    if (stack == MAP_FAILED) throw std::bad_alloc();
  }
  ~Fiber() { munmap(stack, kStackBytes); }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  int index;
  void* stack;
  void* pointer = nullptr;  // its stack pointer while it does not run
  bool ended = true;
#if !defined(__x86_64__)
  ucontext_t context{};
#endif
};

#if defined(__x86_64__)

// Saves what a called function must preserve, stores the stack pointer at *from and continues at `to`. By a jump: where
// a `ret` goes, processors guess from the calls of the stack that was left.
extern "C" void nb_switch_stack(void** from, void* to);
asm(R"(
.text
.globl nb_switch_stack
.type nb_switch_stack, @function
nb_switch_stack:
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
  popq %rcx
  jmp *%rcx
.size nb_switch_stack, .-nb_switch_stack
.section .note.GNU-stack,"",@progbits
.text
)");

#endif

FiberPool::FiberPool() = default;
FiberPool::~FiberPool() = default;

namespace {

// Who enters a fiber for the first time cannot be given arguments by the switch.
thread_local FiberPool* entering = nullptr;

}  // namespace

void FiberPool::enter(FiberPool* pool) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &pool->outside_bottom_, &pool->outside_size_);
#endif
  Fiber* self = pool->current_;
  pool->body_(self->index);
  self->ended = true;
  // Never false, but a function that cannot return makes the sanitizer look at a stack it does not know yet.
  while (self->ended) pool->yield();
}

void FiberPool::start(int count, std::function<void(int)> body) {
  body_ = std::move(body);
  while (static_cast<int>(fibers_.size()) < count) {
    fibers_.push_back(std::make_unique<Fiber>(static_cast<int>(fibers_.size())));
  }
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *fibers_[static_cast<std::size_t>(i)];
    fiber.ended = false;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.stack, kStackBytes);  // frames that were dropped
#endif
#if defined(__x86_64__)
    // As if it had been switched away from: six registers, then the place to return to. The ABI wants the stack 16-byte
    // aligned before a call, so 8 off at a function's first instruction.
    auto* top = reinterpret_cast<void**>(static_cast<std::byte*>(fiber.stack) + kStackBytes - offset_of(i));
    *--top = nullptr;
    void (*first)() = [] { enter(entering); };
    *--top = reinterpret_cast<void*>(first);
    for (int r = 0; r < 6; ++r) *--top = nullptr;
    fiber.pointer = top;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    void (*first)() = [] { enter(entering); };
    makecontext(&fiber.context, first, 0);
#endif
  }
}

bool FiberPool::resume(int index) {
  current_ = fibers_[static_cast<std::size_t>(index)].get();
  entering = this;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, current_->stack, kStackBytes);
#endif
#if defined(__x86_64__)
  nb_switch_stack(&outside_, current_->pointer);
#else
  ucontext_t here;
  outside_ = &here;
  swapcontext(&here, &current_->context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  return std::exchange(current_, nullptr)->ended;
}

void FiberPool::yield() {
  Fiber* self = current_;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, outside_bottom_, outside_size_);
#endif
#if defined(__x86_64__)
  nb_switch_stack(&self->pointer, outside_);
#else
  swapcontext(&self->context, static_cast<ucontext_t*>(outside_));
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, &outside_bottom_, &outside_size_);
#endif
}

}  // namespace nb::emulation
