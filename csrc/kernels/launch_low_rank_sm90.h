// The low-rank passes of the sm_90a family: how a matrix is cut into blocks, their tensor maps and
// scratch. Host code without torch.
#pragma once

#include <limits>

#include "elementwise.h"
#include "low_rank_sm90.h"
#include "rank_groups.h"
#include "tensor_map_sm90.h"

namespace lora_ext::sm90 {

// What a cut is chosen by: how many tiles there are, and how many bytes a block moves for each.
struct LowRankSize {
  int64_t row_tiles, column_tiles;
  int64_t stage_bytes;    // a tile of X, and of L
  int64_t row_bytes;      // R of a tile of rows, and what becomes of their P
  int64_t column_bytes;   // what becomes of the Q of a tile of columns
  int most_column_tiles;  // of a block that makes Q; or 0
};

// The tiles of a block, how many blocks that makes, and what it costs.
struct LowRankCut {
  int64_t row_tiles, column_tiles;
  int64_t row_blocks, column_blocks;
  int64_t bytes = std::numeric_limits<int64_t>::max();  // that the busiest multiprocessor moves
};

inline LowRankCut cut_of(const LowRankSize& size, int64_t column_tiles, int64_t multiprocessors) {
  const int64_t column_blocks = ceil_div(size.column_tiles, column_tiles);
  const int64_t wanted = larger(1, smaller(size.row_tiles, multiprocessors / column_blocks));
  const int64_t row_tiles = ceil_div(size.row_tiles, wanted);
  const int64_t row_blocks = ceil_div(size.row_tiles, row_tiles);
  const int64_t turns = ceil_div(row_blocks * column_blocks, multiprocessors);
  const int64_t bytes = turns * (row_tiles * (column_tiles * size.stage_bytes + size.row_bytes) +
                                 column_tiles * size.column_bytes);
  return {row_tiles, column_tiles, row_blocks, column_blocks, bytes};
}

// Of a few cuts that keep every multiprocessor busy the one with the least to move: few parts of P
// want wide blocks, few of Q high ones.
inline LowRankCut choose_cut(const LowRankSize& size, int64_t multiprocessors) {
  constexpr int64_t kTried = 8;
  LowRankCut best{};
  const auto consider = [&](int64_t column_tiles) {
    const LowRankCut cut = cut_of(size, column_tiles, multiprocessors);
    if (cut.bytes < best.bytes) best = cut;
  };
  if (size.most_column_tiles > 0) {
    const int64_t most = smaller(size.most_column_tiles, size.column_tiles);
    for (int64_t tiles = 1; tiles <= most; ++tiles) consider(tiles);
  } else {
    const int64_t first = smaller(larger(1, multiprocessors / size.row_tiles), size.column_tiles);
    const int64_t last = smaller(first + kTried, size.column_tiles);
    for (int64_t blocks = first; blocks <= last; ++blocks) {
      consider(ceil_div(size.column_tiles, blocks));
    }
  }
  return best;
}

// What a pass multiplies; data null where P or Q is not wanted.
template <class T>
struct LowRankPass {
  Matrix<T> X;
  Split<T> L;  // [r, C], or [C, r] for Major::kMN
  Split<T> R;  // [M, r]
  int64_t r;
  Dropout dropout;
  KeptBits kept;      // to be written, or none
  bool Q_transposed;  // [r, C] instead of [C, r]
};

template <class T>
int terms_of(const Split<T>& matrix) {
  return matrix.value.data ? (matrix.remainder ? 2 : 1) : 0;
}

template <class T>
void fill_maps(arch::TensorMap (&maps)[2], const Split<T>& matrix, int rows, int columns,
               Swizzle swizzle) {
  if (matrix.value.data) maps[0] = tensor_map(matrix.value, rows, columns, swizzle);
  if (matrix.remainder) maps[1] = tensor_map(matrix.rest(), rows, columns, swizzle);
}

// As many stages as fit beside each other, and no more than the block has tiles.
template <class Shape>
LowRankLayout layout_for(int L_terms, int R_terms, int64_t tiles) {
  constexpr int64_t kMostStages = 8;
  const int stage = Shape::kXBytes + L_terms * Shape::kLBytes, R = R_terms * Shape::kRBytes;
  const int left = kMostSharedBytes - kRSlots * (R + 16);
  const auto stages = static_cast<int>(smaller(left / (stage + 16), smaller(tiles, kMostStages)));
  const int R_tiles = stages * stage, barriers = R_tiles + kRSlots * R;
  return {stages, stage, R_tiles, R, barriers, barriers + (stages + kRSlots) * 16};
}

// One group of the ranks, those of L and R.
template <class T, class Shape>
void launch_low_rank_group(const LowRankPass<T>& pass, const LowRankCut& cut,
                           const LowRankParams<T>& whole, Stream stream) {
  LowRankParams<T> params = whole;
  params.X = tensor_map(pass.X, Shape::kRows, 64, Swizzle::k128);
  if constexpr (Shape::kMajorL == Major::kMN) {
    fill_maps(params.L, pass.L, Shape::kColumns, Shape::kRankBox, Shape::kSwizzle);
  } else {
    fill_maps(params.L, pass.L, Shape::kN, 64, Swizzle::k128);
  }
  fill_maps(params.R, pass.R, Shape::kRows, Shape::kRankBox, Shape::kSwizzle);
  params.layout =
      layout_for<Shape>(params.L_terms, params.R_terms, cut.row_tiles * cut.column_tiles);
  const dim3 grid(static_cast<unsigned>(cut.column_blocks), static_cast<unsigned>(cut.row_blocks));
  arch::launch_dependent(low_rank_sm90_kernel<T, Shape>, grid, Shape::kThreads, params.layout.bytes,
                         stream, params);
}

struct LowRankParts {
  Parts P, Q;
};

// The kernel for a group of the ranks, the narrowest that holds it. Where P is wanted of dy and Q
// is not, that is one that makes both, up to the rank where they fit.
template <class T, int kWidth, Major kMajorL>
void launch_low_rank_width(const LowRankPass<T>& group, const LowRankCut& cut,
                           const LowRankParams<T>& params, Stream stream) {
  if constexpr (kMajorL == Major::kK) {
    launch_low_rank_group<T, LowRankShape<kWidth, true, false, kMajorL>>(group, cut, params,
                                                                         stream);
  } else if (params.L_terms == 0) {
    launch_low_rank_group<T, LowRankShape<kWidth, false, true, kMajorL>>(group, cut, params,
                                                                         stream);
  } else if constexpr (kWidth <= kMostRankOfBoth) {
    launch_low_rank_group<T, LowRankShape<kWidth, true, true, kMajorL>>(group, cut, params, stream);
  } else {
    launch_low_rank_group<T, LowRankShape<kWidth, true, false, kMajorL>>(group, cut, params,
                                                                         stream);
  }
}

// By groups of ranks; P and Q of more than kMostRankOfBoth are passes of their own.
template <class T, Major kMajorL>
LowRankParts launch_low_rank(const LowRankPass<T>& pass, const Allocator& scratch, Stream stream) {
  using Any = LowRankShape<16, true, false, kMajorL>;
  const int64_t M = pass.X.rows, C = pass.X.columns, r = pass.r;
  const int L_terms = terms_of(pass.L), R_terms = terms_of(pass.R);
  const int64_t rank = smaller(round_up(r, 16), kMostRank);
  const int64_t P_bytes = L_terms ? Any::kRows * rank * 4 : 0;
  const int64_t Q_bytes = R_terms ? Any::kColumns * rank * 4 : 0;
  const LowRankSize size{.row_tiles = ceil_div(M, Any::kRows),
                         .column_tiles = ceil_div(C, Any::kColumns),
                         .stage_bytes = Any::kXBytes + L_terms * Any::kColumns * rank * 2,
                         .row_bytes = R_terms * Any::kRows * rank * 2 + 2 * P_bytes,
                         .column_bytes = 2 * Q_bytes,
                         .most_column_tiles = R_terms ? most_column_tiles(rank) : 0};
  const LowRankCut cut = choose_cut(size, arch::multiprocessors());
  float* const P = L_terms ? scratch.get<float>(cut.column_blocks * M * r) : nullptr;
  float* const Q = R_terms ? scratch.get<float>(cut.row_blocks * C * r) : nullptr;
  for_each_group<kMostRank>(r, [&](int64_t first, int64_t count, auto width) {
    LowRankPass<T> group = pass;
    if (L_terms) {
      group.L = kMajorL == Major::kMN ? pass.L.columns(first, count) : pass.L.rows(first, count);
    }
    if (R_terms) group.R = pass.R.columns(first, count);
    LowRankParams<T> params{};
    params.L_terms = L_terms, params.R_terms = R_terms;
    params.M = M, params.C = C, params.rank = static_cast<int>(count);
    params.row_tiles = static_cast<int>(cut.row_tiles);
    params.column_tiles = static_cast<int>(cut.column_tiles);
    params.dropout = pass.dropout;
    params.dropout.enabled = pass.dropout.drops();
    if (first == 0) params.kept = pass.kept;
    params.report = arch::wait_report(arch::WaitingKernel::kLowRank);
    params.P_stride = r, params.P = P ? P + first : nullptr;
    params.Q_row = pass.Q_transposed ? 1 : r, params.Q_column = pass.Q_transposed ? C : 1;
    params.Q_part = C * r, params.Q = Q ? Q + first * params.Q_column : nullptr;
    launch_low_rank_width<T, decltype(width)::value, kMajorL>(group, cut, params, stream);
  });
  return {{P, static_cast<int>(cut.column_blocks)}, {Q, static_cast<int>(cut.row_blocks)}};
}

template <class T>
Parts launch_down(const Matrix<T>& x, const Split<T>& A, const Dropout& dropout,
                  const Allocator& scratch, Stream stream) {
  const LowRankPass<T> pass{x, A, {}, A.value.rows, dropout, {}, false};
  return launch_low_rank<T, Major::kK>(pass, scratch, stream).P;
}

// One pass over dy for both while both fit: then dy is read once, and dh has parts for every few of
// its columns; of wider ranks these parts would be more than another reading of dy.
template <class T>
UpGradParts launch_up_grad(const UpGrad<T>& call, const Allocator& scratch, Stream stream) {
  const int64_t r = call.B.value.columns;
  const LowRankPass<T> both{call.dy, call.wants_dh ? call.B : Split<T>{}, call.h, r, {}, {}, false};
  if (r <= kMostRankOfBoth) {
    const auto [dh, dB] = launch_low_rank<T, Major::kMN>(both, scratch, stream);
    return {dh, dB};
  }
  UpGradParts parts{};
  LowRankPass<T> dh = both, dB = both;
  dh.R = dB.L = {};
  if (call.wants_dh) parts.dh = launch_low_rank<T, Major::kMN>(dh, scratch, stream).P;
  if (call.h.value.data) parts.dB = launch_low_rank<T, Major::kMN>(dB, scratch, stream).Q;
  return parts;
}

template <class T>
Parts launch_down_grad(const Matrix<T>& x, const Split<T>& dh, const Dropout& dropout,
                       const KeptBits& kept, const Allocator& scratch, Stream stream) {
  const LowRankPass<T> pass{x, {}, dh, dh.value.columns, dropout, kept, true};
  return launch_low_rank<T, Major::kMN>(pass, scratch, stream).Q;
}

}  // namespace lora_ext::sm90
