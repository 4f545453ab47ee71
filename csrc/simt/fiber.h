// Stacks, and switches between them without a system call. The executor selects the next fiber.
#pragma once

#include <setjmp.h>

namespace fusedkv::simt {

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;  // false: runs from the beginning when it is switched to next
};

// Continues `to`, or starts entry() there. Returns after the next switch to `from`. entry() never returns. A
// restart of a fiber discards its stack without destructors.
void switch_fiber(Fiber& from, Fiber& to, void (*entry)());

}  // namespace fusedkv::simt
