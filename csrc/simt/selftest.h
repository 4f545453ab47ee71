// Kernels that test the executor itself: single instructions, and kernels with a fault planted on request.
#pragma once

#include <cstdint>

namespace fusedkv::simt {

struct SelfTest {
  const uint32_t* a;
  const uint32_t* b;
  uint32_t* out;
  int n;      // elements of a
  int fault;  // 1: with the planted fault
};

// False if there is no such kernel.
bool run_selftest(const char* name, const SelfTest& p);

}  // namespace fusedkv::simt
