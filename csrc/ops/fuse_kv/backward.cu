// dx_j = w_j (.) dout     (written, or added to buffers)
// dw_j[g,d] = sum_{b,t} dout[b,t,g,d] * x_j[b,t,g,d]
//
// Memory-bound, one pass: dout and the sources are read from memory once. A block has a chunk of
// kFuseChunkTokens tokens and kMostColumns 16-byte pieces of the channels. It is narrow, so that a few
// thousand tokens fill the GPU, and still reads whole 128-byte lines. A thread keeps the weights and the
// partial weight gradients of its piece in registers and loops over the chunk's tokens. The block's rows are
// summed through shared memory. A second kernel sums the chunks pairwise. The shape fixes every order: two
// runs give the same bits, on any GPU.

#include "ops/fuse_kv/threads.cuh"

namespace fusedkv {

namespace {

constexpr int kMostColumns = 8;

struct BackwardParams {
  FuseKVParams op;
  int columns;
};

// grad_sources of sources first .. first + kSources - 1 at one token.
template <typename T, int kSources, typename Acc>
__device__ __forceinline__ void write_gradients(const FuseKVParams& p, int first, int64_t offset,
                                                const Acc (&w)[kSources][Piece<T>::kVec],
                                                const Piece<T>& dout) {
  constexpr int kVec = Piece<T>::kVec;
  const auto used = [&](int j) { return j == 0 || first + j < p.m; };
  if constexpr (sizeof(T) == 2) {
    if (p.accumulate && p.grad_dtype != p.dtype) {
      float grads[kSources][kVec];
#pragma unroll
      for (int j = 0; j < kSources; ++j)
        if (used(j)) read_sums(static_cast<const float*>(p.grad_sources[first + j]) + offset, grads[j]);
#pragma unroll
      for (int j = 0; j < kSources; ++j) {
        if (!used(j)) continue;
#pragma unroll
        for (int i = 0; i < kVec; ++i) grads[j][i] += w[j][i] * widen(dout.element[i]);
        write_sums(static_cast<float*>(p.grad_sources[first + j]) + offset, grads[j]);
      }
      return;
    }
  }
  Piece<T> old[kSources];
#pragma unroll
  for (int j = 0; j < kSources; ++j)
    if (p.accumulate && used(j)) old[j] = read(static_cast<const T*>(p.grad_sources[first + j]) + offset);
#pragma unroll
  for (int j = 0; j < kSources; ++j) {
    if (!used(j)) continue;
    Piece<T> piece;
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const Acc gradient = w[j][i] * widen(dout.element[i]);
      narrow(p.accumulate ? widen(old[j].element[i]) + gradient : gradient, &piece.element[i]);
    }
    write(static_cast<T*>(p.grad_sources[first + j]) + offset, piece);
  }
}

// Sums the partial weight gradients of the block's rows, in their order.
template <typename T, int kSources, typename Acc>
__device__ __forceinline__ void reduce_rows(const BackwardParams& params, int first,
                                            const ThreadPlace<T>& thread,
                                            const Acc (&sums)[kSources][Piece<T>::kVec]) {
  constexpr int kVec = Piece<T>::kVec, kAccVec = Piece<Acc>::kVec, kPieces = kVec / kAccVec;
  const FuseKVParams& p = params.op;
  const int row_pieces = kSources * params.columns * kPieces;
  const uint32_t shared = shared_base();
  if (thread.active) {
#pragma unroll
    for (int j = 0; j < kSources; ++j)
#pragma unroll
      for (int h = 0; h < kPieces; ++h) {
        Piece<Acc> piece;
#pragma unroll
        for (int k = 0; k < kAccVec; ++k) piece.element[k] = sums[j][h * kAccVec + k];
        const int slot = (j * params.columns + thread.column) * kPieces + h;
        ptx::st_shared_b128(shared + uint32_t(thread.row * row_pieces + slot) * 16, piece.raw);
      }
  }
  __syncthreads();
  Acc* partial = static_cast<Acc*>(p.partial_weights) + int64_t(blockIdx.x) * p.m * p.G * p.D;
  for (int slot = int(threadIdx.x); slot < row_pieces; slot += kFuseThreads) {
    const int j = first + slot / (params.columns * kPieces);
    const int64_t channel =
        int64_t(blockIdx.y) * params.columns * kVec + int64_t(slot % (params.columns * kPieces)) * kAccVec;
    if (j >= p.m || channel >= p.G * p.D) continue;
    Piece<Acc> total;
    total.raw = ptx::ld_shared_b128(shared + uint32_t(slot) * 16);
#pragma unroll 4
    for (int row = 1; row < thread.rows; ++row) {
      Piece<Acc> next;
      next.raw = ptx::ld_shared_b128(shared + uint32_t(row * row_pieces + slot) * 16);
#pragma unroll
      for (int k = 0; k < kAccVec; ++k) total.element[k] += next.element[k];
    }
    write(partial + j * p.G * p.D + channel, total);
  }
  __syncthreads();  // before the next sources' sums
}

// One source, or any number of them two at a time: dout is read again for each pair, from the L2 cache.
template <typename T, int kSources>
__global__ void __launch_bounds__(kFuseThreads, 2)
    fuse_kv_backward_kernel(const __grid_constant__ BackwardParams params) {
  using Acc = typename SumType<T>::type;
  constexpr int kVec = Piece<T>::kVec;
  constexpr int kUnroll = 4 / kSources;  // tokens that a thread loads before it uses the first
  const FuseKVParams& p = params.op;
  const ThreadPlace<T> thread(p, params.columns);
  const int64_t width = p.G * p.D, first_token = blockIdx.x * kFuseChunkTokens;
  const int64_t last =
      first_token + kFuseChunkTokens < p.B * p.T ? first_token + kFuseChunkTokens : p.B * p.T;
  const bool wants_sources = p.grad_sources[0] != nullptr, wants_weights = p.partial_weights != nullptr;

  for (int first = 0; first < p.m; first += kSources) {
    const auto used = [&](int j) { return j == 0 || first + j < p.m; };
    Acc w[kSources][kVec] = {}, sums[kSources][kVec] = {};
    if (thread.active && wants_sources) {
#pragma unroll
      for (int j = 0; j < kSources; ++j)
        if (used(j))
          read_sums(static_cast<const Acc*>(p.weights) + (first + j) * width + thread.channel, w[j]);
    }
    TokenWalk walk(first_token + thread.row, thread.rows, p);
    while (thread.active && walk.token < last) {
      const int64_t token = walk.token;
      Piece<T> dout[kUnroll], x[kUnroll][kSources];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const bool exists = walk.token < last;
        dout[u].raw = uint4{0, 0, 0, 0};
        if (exists)
          dout[u] = read_once(static_cast<const T*>(p.grad_out) + walk.token * width + thread.channel);
#pragma unroll
        for (int j = 0; j < kSources; ++j) {
          x[u][j].raw = uint4{0, 0, 0, 0};
          if (!exists || !wants_weights || !used(j)) continue;
          const TokenTensor& source = p.sources[first + j];
          x[u][j] = read_once(static_cast<const T*>(source.data) + walk.b * source.stride_b +
                              walk.t * source.stride_t + thread.g * source.stride_g + thread.d);
        }
        walk.advance();
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u)
#pragma unroll
        for (int j = 0; j < kSources; ++j)
#pragma unroll
          for (int i = 0; i < kVec; ++i) sums[j][i] += widen(dout[u].element[i]) * widen(x[u][j].element[i]);
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t own = token + u * walk.step;
        if (wants_sources && own < last)
          write_gradients<T, kSources, Acc>(p, first, own * width + thread.channel, w, dout[u]);
      }
    }
    if (wants_weights) reduce_rows<T, kSources, Acc>(params, first, thread, sums);
  }
}

// ---- sum over the chunks -----------------------------------------------------------------------

struct ReduceParams {
  void* partial;  // (chunks, width); overwritten
  void* out;      // (width,)
  int64_t chunks, width;
};

constexpr int kReduceColumns = 4;  // pieces of a block; 64 bytes of a row
constexpr int kReduceRows = kFuseThreads / kReduceColumns;
constexpr int kReduceChunks = 8;  // per pass

// Pairwise, chunk i += chunk i + step for step = 1, 2, 4, .., in place: three of these steps in each pass.
template <typename Acc>
__global__ void __launch_bounds__(kFuseThreads)
    fuse_kv_reduce_kernel(const __grid_constant__ ReduceParams p) {
  constexpr int kVec = Piece<Acc>::kVec;
  const int64_t channel = (int64_t(blockIdx.x) * kReduceColumns + threadIdx.x % kReduceColumns) * kVec;
  const int row = int(threadIdx.x) / kReduceColumns;
  const bool active = channel < p.width;
  Acc* partial = static_cast<Acc*>(p.partial) + channel;
  Acc* out = static_cast<Acc*>(p.out) + channel;
  if (p.chunks == 0) {
    if (active && row == 0) write(out, Piece<Acc>{uint4{0, 0, 0, 0}});
    return;
  }
  for (int64_t step = 1;; step *= kReduceChunks) {
    const bool last = step * kReduceChunks >= p.chunks;
    for (int64_t i = row * kReduceChunks * step; active && i < p.chunks;
         i += kReduceRows * kReduceChunks * step) {
      Piece<Acc> x[kReduceChunks];
#pragma unroll
      for (int k = 0; k < kReduceChunks; ++k)
        if (i + k * step < p.chunks) x[k] = read(partial + (i + k * step) * p.width);
#pragma unroll
      for (int s = 1; s < kReduceChunks; s *= 2)
#pragma unroll
        for (int k = 0; k < kReduceChunks; k += 2 * s) {
          if (i + (k + s) * step >= p.chunks) continue;
#pragma unroll
          for (int e = 0; e < kVec; ++e) x[k].element[e] += x[k + s].element[e];
        }
      write(last ? out : partial + i * p.width, x[0]);
    }
    if (last) return;
    __syncthreads();
  }
}

template <typename T>
int backward(const FuseKVParams& p, void* stream) {
  using Acc = typename SumType<T>::type;
  if (num_chunks(p) > 0) {
    const int64_t pieces = p.G * p.D / Piece<T>::kVec;
    const int columns = columns_per_block(pieces, kMostColumns);
    const BackwardParams params{p, columns};
    const dim3 grid(unsigned(num_chunks(p)), unsigned((pieces + columns - 1) / columns));
    const auto run = [&](auto kernel, int sources) {
      const size_t shared = p.partial_weights ? kFuseThreads * sources * Piece<T>::kVec * sizeof(Acc) : 0;
      return launch(kernel, grid, dim3(kFuseThreads), shared, stream, params);
    };
    constexpr int kPair = sizeof(T) == 8 ? 1 : 2;  // fp64 is for gradient checks
    const int error =
        p.m == 1 ? run(fuse_kv_backward_kernel<T, 1>, 1) : run(fuse_kv_backward_kernel<T, kPair>, kPair);
    if (error || p.partial_weights == nullptr) return error;
  }
  if (p.grad_weights == nullptr) return 0;
  const ReduceParams reduce{p.partial_weights, p.grad_weights, num_chunks(p), p.m * p.G * p.D};
  const int64_t pieces = reduce.width / Piece<Acc>::kVec;
  return launch(fuse_kv_reduce_kernel<Acc>, dim3(unsigned((pieces + kReduceColumns - 1) / kReduceColumns)),
                dim3(kFuseThreads), 0, stream, reduce);
}

}  // namespace

int fuse_kv_backward_cuda(const FuseKVParams& params, void* stream) {
  if (params.G == 0) return 0;
  int error = 0;
  dispatch_dtype(params.dtype,
                 [&](auto tag) { error = backward<typename decltype(tag)::type>(params, stream); });
  return error;
}

}  // namespace fusedkv
