// Checks of cached keys and values, shared by attention and append: codes, shapes, lengths, block tables.
#pragma once

#include "api/checks.h"

namespace fusedkv::api {

// How a cache stores its elements.
inline CacheCode code_of(const Tensor& cache) {
  switch (cache.scalar_type()) {
    case ScalarType::Char:
      return CacheCode::i8;
    case ScalarType::Byte:
      return CacheCode::i4;
    case ScalarType::Float8_e4m3fn:
      return CacheCode::e4m3;
    default:
      return CacheCode::raw;
  }
}

// Channels of a cache's head.
inline int64_t channels_of(const Tensor& cache, CacheCode code) {
  return code == CacheCode::i4 ? 2 * cache.size(3) : cache.size(3);
}

// How positions map to slots: contiguous (B, capacity, G, D) or paged (P, page_size, G, D).
struct CacheLayout {
  const int32_t* seq_lens = nullptr;
  const int32_t* block_table = nullptr;
  int64_t block_table_stride = 0;
  int64_t num_pages = 0;
  int64_t page_size = 0;
  int64_t capacity = 0;  // tokens per sequence
};

inline CacheLayout cache_layout(const Tensor& cache, Name name, const Tensor& seq_lens,
                                const std::optional<Tensor>& block_table, int64_t B, bool cuda) {
  CacheLayout layout;
  check_int32(seq_lens, "cache_seqlens", 1, cuda);
  check_value(seq_lens.size(0) == B, "cache_seqlens must have ", B, " entries, the batch size, got ",
              seq_lens.size(0));
  layout.seq_lens = static_cast<const int32_t*>(seq_lens.const_data_ptr());
  if (!block_table) {
    check_value(cache.size(0) == B, name, " must be (B, capacity, G, D) with B = ", B, ", got ", Shape{cache},
                "; pass block_table for a paged cache");
    layout.capacity = cache.size(1);
    return layout;
  }
  check_int32(*block_table, "block_table", 2, cuda);
  check_value(block_table->size(0) == B, "block_table must have ", B, " rows, the batch size, got ",
              block_table->size(0));
  check_value(cache.size(1) >= 1, name, " must be (P, page_size, G, D) with page_size >= 1, got ",
              Shape{cache});
  layout.block_table = static_cast<const int32_t*>(block_table->const_data_ptr());
  layout.block_table_stride = block_table->stride(0);
  layout.num_pages = cache.size(0);
  layout.page_size = cache.size(1);
  layout.capacity = block_table->size(1) * layout.page_size;
  return layout;
}

inline void check_length(const CacheLayout& layout, int64_t b) {
  const int64_t len = layout.seq_lens[b];
  check_value(len >= 0 && len <= layout.capacity, "cache_seqlens[", b, "] must be from 0 to ",
              layout.capacity, ", the tokens of the cache, got ", len);
}

// The pages of positions [begin, end) of sequence b exist.
inline void check_pages(const CacheLayout& layout, int64_t b, int64_t begin, int64_t end) {
  if (!layout.block_table || begin >= end) return;
  for (int64_t i = begin / layout.page_size; i <= (end - 1) / layout.page_size; ++i) {
    const int64_t page = layout.block_table[b * layout.block_table_stride + i];
    check_value(page >= 0 && page < layout.num_pages, "block_table[", b, ", ", i,
                "] must be a page from 0 to ", layout.num_pages - 1, ", got ", page);
  }
}

}  // namespace fusedkv::api
