// What the kernels for CUDA cores share: teams of 8, 16 or 32 lanes with 8 channels each.
//
// Every team has its own tokens, and the softmax state and output of the same four query rows. The results of
// the teams are merged at the end of a chunk. All sums are float32.
#pragma once

#include "ops/attn_decode/kernels.h"
#include "ops/attn_decode/work.cuh"

namespace fusedkv {

constexpr int kTeamRows = kFallbackRows, kTeamVec = 8;

// T: of q, raw caches and out.
template <typename T_, int kD_>
struct TeamKernel {
  using T = T_;
  static constexpr int kD = kD_;
  static constexpr FallbackLayout kLayout = fallback_layout(kD);
  static constexpr int kLanes = kLayout.lanes, kTeams = kLayout.teams, kThreads = kLayout.threads;
};

struct TeamState {
  float max[kTeamRows], sum[kTeamRows];  // the same in all lanes of the team
  float o[kTeamRows][kTeamVec];
};

__device__ __forceinline__ TeamState empty_team_state() {
  TeamState state;
#pragma unroll
  for (int r = 0; r < kTeamRows; ++r) {
    state.max[r] = minus_infinity(), state.sum[r] = 0.f;
#pragma unroll
    for (int i = 0; i < kTeamVec; ++i) state.o[r][i] = 0.f;
  }
  return state;
}

// The block's result is NaN: a length or a page of the sequence is out of range.
__device__ __forceinline__ void spoil_if(bool bad, TeamState& state) {
  if (!__any_sync(kFullWarp, bad)) return;
#pragma unroll
  for (int r = 0; r < kTeamRows; ++r) state.sum[r] = not_a_number();
}

// All chunks of a block. run(chunk, state, team, d) adds the chunk's tokens to an empty state: those of team
// `team`, with the channels from d on in this lane.
template <typename K, typename Run>
__device__ __forceinline__ void run_chunks(const AttnCudaParams& p, const Run& run) {
  const int team = threadIdx.x / K::kLanes, d = threadIdx.x % K::kLanes * kTeamVec;
  const BlockStates states = block_states(shared_base(), K::kTeams, kTeamRows, K::kD);
  const BlockWork work = begin_block(p, K::kThreads);
  WorkChunk w = {};
  w.next = work.begin;
  while ((w = next_chunk(p, work, w.next)).splits > 0) {
    TeamState state = empty_team_state();
    run(w, state, team, d);
#pragma unroll
    for (int r = 0; r < kTeamRows; ++r) {
      const int row = team * kTeamRows + r;
      if (d == 0) ptx::st_shared_f32(states.maxima + row * 4, state.max[r]);
      if (d == 0) ptx::st_shared_f32(states.sums + row * 4, state.sum[r]);
#pragma unroll
      for (int i = 0; i < kTeamVec; ++i)
        ptx::st_shared_f32(states.outs + (row * K::kD + d + i) * 4, state.o[r][i]);
    }
    __syncthreads();
    merge_states<typename K::T>(p, w, states, K::kThreads);
    finish_chunk<typename K::T>(p, w, states.flag, states.outs, K::kThreads);
    __syncthreads();  // the next chunk reuses shared memory
  }
}

}  // namespace fusedkv
