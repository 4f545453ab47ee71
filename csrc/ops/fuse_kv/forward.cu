// out[b,t,g,d] = sum_j w[j,g,d] * x_j[b,t,g,d]
//
// Memory-bound: m + 1 elements move per output element for m multiply-adds, so the tiling maximizes loads in
// flight. A thread owns one 16-byte piece of the channels (g, d .. d + kVec - 1) and loops over tokens. Its
// weights stay in registers, adjacent threads read contiguous bytes of a token, and several tokens of all
// sources are loaded before the first one is used. Sums are fp32 (fp64 for fp64), rounded once. K and V of a
// layer share one launch; blockIdx.z selects.

#include "ops/fuse_kv/threads.cuh"

namespace fusedkv {

namespace {

constexpr int kMostColumns = 64;  // 1 KiB of a token
constexpr int kWaves = 2;         // of blocks: balances K and V of different m

// Resident blocks per SM; sources 0: any number.
constexpr int resident_blocks(int sources) {
  return sources == 1 ? 3 : 2;
}

// Tokens that a thread loads before it uses the first: at most 8 loads, so that two blocks fit the registers.
template <int kSources>
constexpr int kTokensAtOnce = kSources == 4 ? 2 : 4;

struct ForwardParams {
  FuseKVParams sums[2];
  int columns[2];
};

enum class Kind { kNothing, kRead, kZeros, kNaN };

// The place of an output token in the sources: index `outer` of their first dim and `inner` of the second.
struct Place {
  Kind kind;
  int outer, inner;
};

__device__ __forceinline__ Place place_of(const FuseKVParams& p, int b, int t) {
  if (p.seq_lens == nullptr) return {Kind::kRead, b, t};
  const int len = load(p.seq_lens + b);
  if (len < 0 || len > p.capacity) return {Kind::kNaN, 0, 0};
  const int position = len - (int(p.T) - t);
  if (position < 0) return {Kind::kZeros, 0, 0};
  if (p.block_table == nullptr) return {Kind::kRead, b, position};
  const int page_size = int(p.page_size), entry = position / page_size;
  const int page = load(p.block_table + b * p.block_table_stride + entry);
  if (page < 0 || page >= p.num_pages) return {Kind::kNaN, 0, 0};
  return {Kind::kRead, page, position - entry * page_size};
}

// The next tokens of a walk.
template <int kUnroll>
__device__ __forceinline__ void next_places(const FuseKVParams& p, TokenWalk& walk,
                                            Place (&places)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    places[u] = {Kind::kNothing, 0, 0};
    if (walk.token < p.B * p.T) places[u] = place_of(p, walk.b, walk.t);
    walk.advance();
  }
}

template <typename T>
__device__ __forceinline__ Piece<T> piece_at(const TokenTensor& source, const Place& place,
                                             const ThreadPlace<T>& thread) {
  if (place.kind != Kind::kRead) return Piece<T>{uint4{0, 0, 0, 0}};
  return read_once(static_cast<const T*>(source.data) + place.outer * source.stride_b +
                   place.inner * source.stride_t + thread.g * source.stride_g + thread.d);
}

template <typename T, typename Acc>
__device__ __forceinline__ void write_token(T* to, const Place& place, const Acc (&sum)[Piece<T>::kVec]) {
  if (place.kind == Kind::kNothing) return;
  const Acc otherwise = place.kind == Kind::kZeros ? Acc(0) : Acc(__uint_as_float(0x7fffffffu));
  Piece<T> piece;
#pragma unroll
  for (int i = 0; i < Piece<T>::kVec; ++i)
    narrow(place.kind == Kind::kRead ? sum[i] : otherwise, &piece.element[i]);
  write(to, piece);
}

// m <= kSources: weights stay in registers.
template <typename T, int kSources>
__global__ void __launch_bounds__(kFuseThreads, resident_blocks(kSources))
    fuse_kv_forward_kernel(const __grid_constant__ ForwardParams params) {
  using Acc = typename SumType<T>::type;
  constexpr int kVec = Piece<T>::kVec, kUnroll = kTokensAtOnce<kSources>;
  const FuseKVParams& p = params.sums[blockIdx.z];
  const ThreadPlace<T> thread(p, params.columns[blockIdx.z]);
  if (!thread.active) return;
  const int64_t width = p.G * p.D;

  Acc w[kSources][kVec];
#pragma unroll
  for (int j = 0; j < kSources; ++j)
    if (j == 0 || j < p.m) read_sums(static_cast<const Acc*>(p.weights) + thread.channel + j * width, w[j]);

  TokenWalk walk(int64_t(blockIdx.x) * thread.rows + thread.row, int64_t(gridDim.x) * thread.rows, p);
  while (walk.token < p.B * p.T) {
    T* out = static_cast<T*>(p.out) + walk.token * width + thread.channel;
    Place places[kUnroll];
    next_places(p, walk, places);
    Piece<T> x[kUnroll][kSources];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int j = 0; j < kSources; ++j)
        if (j == 0 || j < p.m) x[u][j] = piece_at<T>(p.sources[j], places[u], thread);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      Acc sum[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) sum[i] = w[0][i] * widen(x[u][0].element[i]);
#pragma unroll
      for (int j = 1; j < kSources; ++j) {
        if (j >= p.m) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[i] += w[j][i] * widen(x[u][j].element[i]);
      }
      write_token(out, places[u], sum);
      out += walk.step * width;
    }
  }
}

// Any m: one source after the other. Weights are read again for each group of tokens; they stay in L1.
template <typename T>
__global__ void __launch_bounds__(kFuseThreads, resident_blocks(0))
    fuse_kv_forward_any_kernel(const __grid_constant__ ForwardParams params) {
  using Acc = typename SumType<T>::type;
  constexpr int kVec = Piece<T>::kVec, kUnroll = kTokensAtOnce<0>;
  const FuseKVParams& p = params.sums[blockIdx.z];
  const ThreadPlace<T> thread(p, params.columns[blockIdx.z]);
  if (!thread.active) return;
  const int64_t width = p.G * p.D;

  TokenWalk walk(int64_t(blockIdx.x) * thread.rows + thread.row, int64_t(gridDim.x) * thread.rows, p);
  while (walk.token < p.B * p.T) {
    T* out = static_cast<T*>(p.out) + walk.token * width + thread.channel;
    Place places[kUnroll];
    next_places(p, walk, places);
    Acc sums[kUnroll][kVec];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
#pragma unroll
      for (int i = 0; i < kVec; ++i) sums[u][i] = Acc(-0.f);  // -0 + x = x, also for x = -0
    for (int j = 0; j < p.m; ++j) {
      Piece<T> x[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) x[u] = piece_at<T>(p.sources[j], places[u], thread);
      Acc w[kVec];
      read_sums(static_cast<const Acc*>(p.weights) + thread.channel + j * width, w);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int i = 0; i < kVec; ++i) sums[u][i] += w[i] * widen(x[u].element[i]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) write_token(out + u * walk.step * width, places[u], sums[u]);
  }
}

template <typename T>
int forward(ForwardParams& params, int count, void* stream) {
  DeviceLimits limits;
  if (int error = device_limits(&limits)) return error;
  int64_t column_blocks = 0, token_blocks = 0;
  int m = 0;
  for (int i = 0; i < count; ++i) {
    const FuseKVParams& p = params.sums[i];
    const int64_t pieces = p.G * p.D / Piece<T>::kVec;
    const int columns = columns_per_block(pieces, kMostColumns), rows = kFuseThreads / columns;
    params.columns[i] = columns;
    const int64_t needed_columns = (pieces + columns - 1) / columns,
                  needed_tokens = (p.B * p.T + rows - 1) / rows;
    column_blocks = needed_columns > column_blocks ? needed_columns : column_blocks;
    token_blocks = needed_tokens > token_blocks ? needed_tokens : token_blocks;
    m = p.m > m ? p.m : m;
  }
  const int64_t resident = int64_t(limits.sm_count) * resident_blocks(m);
  const int64_t wanted = (kWaves * resident + count * column_blocks - 1) / (count * column_blocks);
  const dim3 grid(unsigned(token_blocks < wanted ? token_blocks : wanted), unsigned(column_blocks),
                  unsigned(count));
  const auto run = [&](auto kernel) { return launch(kernel, grid, dim3(kFuseThreads), 0, stream, params); };
  if constexpr (sizeof(T) < 8) {  // fp64 is for gradient checks
    if (m == 1) return run(fuse_kv_forward_kernel<T, 1>);
    if (m == 2) return run(fuse_kv_forward_kernel<T, 2>);
    if (m <= 4) return run(fuse_kv_forward_kernel<T, 4>);
  }
  return run(fuse_kv_forward_any_kernel<T>);
}

}  // namespace

int fuse_kv_forward_cuda(const FuseKVParams* sums, int count, void* stream) {
  if (sums[0].B * sums[0].T * sums[0].G == 0) return 0;
  ForwardParams params{};
  for (int i = 0; i < count; ++i) params.sums[i] = sums[i];
  int error = 0;
  dispatch_dtype(sums[0].dtype,
                 [&](auto tag) { error = forward<typename decltype(tag)::type>(params, count, stream); });
  return error;
}

}  // namespace fusedkv
