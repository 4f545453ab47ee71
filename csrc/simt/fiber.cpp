// makecontext starts a fiber once; from then on _setjmp and _longjmp, which leave the signal mask alone.

// glibc's checked longjmp takes a jump to another stack for a mistake.
#undef _FORTIFY_SOURCE

#include "simt/fiber.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <new>

namespace fusedkv::simt {

namespace {

constexpr size_t kStackBytes = 128 * 1024;

// Lowest page closed: an overflowing stack ends the program instead of spoiling the next one. Kept for good.
char* new_stack() {
  const auto page = size_t(sysconf(_SC_PAGESIZE));
  void* p = mmap(nullptr, kStackBytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED || mprotect(p, page, PROT_NONE)) throw std::bad_alloc();
  return static_cast<char*>(p) + page;
}

}  // namespace

void switch_fiber(Fiber& from, Fiber& to, void (*entry)()) {
  if (!to.stack && !to.started) to.stack = new_stack();
  if (_setjmp(from.context)) return;
  if (to.started) _longjmp(to.context, 1);
  to.started = true;
  ucontext_t start;
  getcontext(&start);
  start.uc_stack.ss_sp = to.stack;
  start.uc_stack.ss_size = kStackBytes;
  start.uc_link = nullptr;
  makecontext(&start, entry, 0);
  setcontext(&start);
}

}  // namespace fusedkv::simt
