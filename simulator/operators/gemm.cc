#include "gemm.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

namespace sim {
namespace {

typedef float Lanes __attribute__((vector_size(64)));  // 16 floats, split where registers are smaller
constexpr int64_t kLanes = 16, kWide = 2 * kLanes, kTall = 6;  // a tile of the result
constexpr int64_t kDepth = 384, kRows = 96;                    // what is packed at a time
constexpr double kWorkOfAThread = 2e6;

// A tile of tall × 32: a is packed (depth, kTall), b (depth, kWide).
void tile(int64_t depth, const float *a, const float *b, float *c, int64_t c_row, int64_t tall,
                       int64_t wide) {
  Lanes sum[kTall][2] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Lanes left, right;
    std::memcpy(&left, b + k * kWide, sizeof left);
    std::memcpy(&right, b + k * kWide + kLanes, sizeof right);
    for (int64_t i = 0; i < kTall; ++i) {
      const float factor = a[k * kTall + i];
      sum[i][0] += factor * left;
      sum[i][1] += factor * right;
    }
  }
  for (int64_t i = 0; i < tall; ++i) {
    float row[kWide];
    std::memcpy(row, sum[i], sizeof row);
    for (int64_t j = 0; j < wide; ++j) c[i * c_row + j] += row[j];
  }
}

// Rows [first, last) of the view as strips of `strip` rows, each (depth, strip), padded with zeros.
void pack(MatrixView m, int64_t first, int64_t last, int64_t from, int64_t depth, int64_t strip, float *to) {
  for (int64_t start = first; start < last; start += strip) {
    const int64_t here = std::min(strip, last - start);
    for (int64_t k = 0; k < depth; ++k) {
      const float *source = m.data + start * m.row + (from + k) * m.column;
      for (int64_t i = 0; i < here; ++i) to[k * strip + i] = source[i * m.row];
      for (int64_t i = here; i < strip; ++i) to[k * strip + i] = 0;
    }
    to += depth * strip;
  }
}

void gemm_part(int64_t rows, int64_t first, int64_t last, int64_t depth, MatrixView a, MatrixView b, float *c,
               int64_t c_row) {
  const int64_t strips = (last - first + kWide - 1) / kWide;
  std::vector<float> packed_b(std::min(depth, kDepth) * strips * kWide), packed_a(kRows * std::min(depth, kDepth));
  for (int64_t from = 0; from < depth; from += kDepth) {
    const int64_t slice = std::min(kDepth, depth - from);
    pack(transposed(b), first, last, from, slice, kWide, packed_b.data());
    for (int64_t top = 0; top < rows; top += kRows) {
      const int64_t bottom = std::min(rows, top + kRows);
      pack(a, top, bottom, from, slice, kTall, packed_a.data());
      for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t left = first + strip * kWide;
        for (int64_t i = top; i < bottom; i += kTall) {
          tile(slice, packed_a.data() + (i - top) * slice, packed_b.data() + strip * slice * kWide,
               c + i * c_row + left, c_row, std::min(kTall, bottom - i), std::min(kWide, last - left));
        }
      }
    }
  }
}

}  // namespace

void in_parallel(int64_t count, double work, const std::function<void(int64_t, int64_t)> &part) {
  static thread_local bool is_shared = false;  // no threads of threads
  if (is_shared || count < 2 || work < kWorkOfAThread || std::thread::hardware_concurrency() < 2) {
    return part(0, count);
  }
  std::exception_ptr errors[2];
  const auto share = [&](int64_t begin, int64_t end, std::exception_ptr *error) {
    is_shared = true;
    try {
      part(begin, end);
    } catch (...) {
      *error = std::current_exception();
    }
    is_shared = false;
  };
  std::thread other(share, count / 2, count, &errors[1]);
  share(0, count / 2, &errors[0]);
  other.join();
  for (const auto &error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

void gemm(int64_t rows, int64_t columns, int64_t depth, MatrixView a, MatrixView b, float *c, int64_t c_row,
          bool accumulate) {
  if (!accumulate) {
    for (int64_t i = 0; i < rows; ++i) std::fill(c + i * c_row, c + i * c_row + columns, 0.0f);
  }
  const double work = 2.0 * rows * columns * depth;
  if (columns >= rows) {
    const int64_t strips = (columns + kWide - 1) / kWide;
    in_parallel(strips, work, [&](int64_t begin, int64_t end) {
      gemm_part(rows, begin * kWide, std::min(columns, end * kWide), depth, a, b, c, c_row);
    });
  } else {
    in_parallel(rows, work, [&](int64_t begin, int64_t end) {
      gemm_part(end - begin, 0, columns, depth, {a.data + begin * a.row, a.row, a.column}, b, c + begin * c_row,
                c_row);
    });
  }
}

}  // namespace sim
