// How rows are dealt to tasks. The deal depends on sizes only, never on the number of threads, so
// results are the same bits with any number of threads.
#pragma once

#include "tile.h"

namespace fmm::cpu::FMM_ISA {

// M rows of each of `planes` (b, h) planes are cut into `chunks` of chunk_rows; every chunk has its
// own column accumulators, which are then added in order.
struct Chunks {
  int64_t chunks, chunk_rows;
};

constexpr int64_t kTasks = 32;                        // enough for even shares on 16 threads
constexpr int64_t kPartialBytes = int64_t{16} << 20;  // of column accumulators, all tasks together
constexpr int64_t kKeepBytes = int64_t{4} << 20;      // packed columns kept for a whole task

inline Chunks chunk_rows(int64_t planes, int64_t rows, int64_t column_bytes) {
  int64_t chunks = planes > 0 ? ceil_div(kTasks, planes) : 1;
  const int64_t most = ceil_div(rows, 2 * kBlock);
  chunks = chunks < most ? chunks : most;
  const int64_t fit = column_bytes > 0 ? kPartialBytes / (planes * column_bytes + 1) : chunks;
  chunks = chunks < fit ? chunks : fit;
  chunks = chunks > 1 ? chunks : 1;
  const int64_t each = round_up(ceil_div(rows, chunks), kBlock);
  return {rows > 0 ? ceil_div(rows, each) : 1, each > 0 ? each : kBlock};
}

// Rows handled between two visits of a column tile: one block if all that is read and added to by
// column stays in cache, else as many as do, to fetch or pack the columns less often.
inline int64_t super_rows(int64_t column_bytes, int64_t row_bytes) {
  constexpr int64_t kCache = int64_t{512} << 10;  // half of a usual second-level cache
  if (column_bytes <= kCache) return kBlock;
  const int64_t fit = kCache / (row_bytes * kBlock + 1);
  return kBlock * (fit < 1 ? 1 : fit > 8 ? 8 : fit);
}

}  // namespace fmm::cpu::FMM_ISA
