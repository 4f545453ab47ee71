// The code that is nearest to a number, the same bits on every device.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/dtype.h"
#include "common/host_device.h"

namespace fusedkv {

// Rounds to an integer from least to most; NaN becomes 0. Adding 1.5 * 2^23 leaves no fraction.
FUSEDKV_HOST_DEVICE int32_t round_within(float x, float least, float most) {
  x = x > most ? most : x;
  x = x < least ? least : x;
  x = x == x ? x : 0.f;
  return int32_t((x + 12582912.f) - 12582912.f);
}

// The code of e4m3 that is nearest, ties to even; numbers beyond 448 become 448.
FUSEDKV_HOST_DEVICE uint8_t round_e4m3(float x) {
  uint32_t u, small;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 24 & 0x80u, magnitude = u & 0x7fffffffu;
  const uint32_t most = 0x43e00000u, held = magnitude < most ? magnitude : most;
  // Below 2^-6 adding 2^14 lines the mantissa up with units of 2^-9.
  float shifted;
  memcpy(&shifted, &held, 4);
  shifted += 16384.f;
  memcpy(&small, &shifted, 4);
  const uint32_t large = (held - 0x3c000000u + 0x7ffffu + (held >> 20 & 1u)) >> 20;
  const uint32_t code = held < 0x3c800000u ? small - 0x46800000u : large;
  return uint8_t(sign | (magnitude > 0x7f800000u ? 0x7fu : code));
}

// One code, in the low bits.
template <CacheCode kCode>
FUSEDKV_HOST_DEVICE uint32_t encode(float u) {
  if (kCode == CacheCode::i8) return uint8_t(round_within(u, -127.f, 127.f));
  if (kCode == CacheCode::i4) return uint32_t(round_within(u, -8.f, 7.f) + 8);
  return round_e4m3(u);
}

}  // namespace fusedkv
