// A stack of its own, and the switch from one to another without a system call. Only this: who runs next is
// the executor's.
#pragma once

#include <setjmp.h>

namespace fusedkv::simt {

struct Fiber {
  jmp_buf context;
  char* stack = nullptr;
  bool started = false;  // false: runs from the beginning when it is switched to next
};

// Goes on with `to`, or starts entry() there; returns when somebody switches to `from` again. entry() never
// returns. What lay on the stack of a fiber that is started anew is forgotten, not destroyed.
void switch_fiber(Fiber& from, Fiber& to, void (*entry)());

}  // namespace fusedkv::simt
