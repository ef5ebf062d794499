// The low-rank passes of the sm_90a family: how a matrix is cut into blocks, their tensor maps and
// scratch. Host code without torch.
#pragma once

#include <limits>
#include <utility>

#include "lora_linear_elementwise.h"
#include "low_rank_sm90.h"
#include "rank_groups.h"
#include "switches.h"
#include "tensor_map_sm90.h"

namespace lora_ext::sm90 {

// What a cut is chosen by: how many tiles there are, and how many bytes a block moves for each.
struct LowRankSize {
  int64_t row_tiles, column_tiles;
  int64_t X_bytes, stage_bytes;  // a tile of X, and with its tile of L
  int64_t R_bytes;               // of a tile of rows
  int64_t P_bytes, Q_bytes;      // sums of a tile of rows, and of one of columns
  int most_column_tiles;         // of a block that makes Q; or 0
};

// The tiles of a block, how many blocks that makes, which of them are a cluster, and what it costs.
struct LowRankCut {
  int64_t row_tiles, column_tiles;
  int64_t row_blocks, column_blocks;
  int cluster = 1;          // blocks
  bool along_rows = false;  // of them; else along the columns, and they share what they read of R
  int64_t cost = std::numeric_limits<int64_t>::max();

  // Whether blocks add what they have summed, and so store results: all that have parts of it are a
  // cluster, or one block has no others.
  bool adds_P = false, adds_Q = false;

  int64_t adders() const { return adds_P ? column_blocks : (adds_Q ? row_blocks : 1); }

  void cluster_of(int blocks, bool rows, bool P, bool Q) {
    cluster = blocks, along_rows = blocks > 1 && rows;
    adds_P = P && !along_rows && column_blocks == cluster;
    adds_Q = Q && (along_rows ? row_blocks == cluster : row_blocks == 1);
    if (adds_P && adds_Q && cluster > 1) adds_Q = false;  // others than those of P
  }
};

// Blocks that run at the same time, in clusters of up to eight: the multiprocessors of an H100 are
// groups of 16 or 18, which a cluster lies within.
constexpr int64_t blocks_at_once(int64_t multiprocessors) {
  return multiprocessors < 16 ? multiprocessors : multiprocessors / 16 * 16;
}

// Bytes that L2 brings to a multiprocessor in the time that the busiest one takes.
inline int64_t cost_of(const LowRankCut& cut, const LowRankSize& size, int64_t at_once) {
  // In these bytes: one of another block's, what blocks wait for each other, one of memory's, and
  // the launch of another kernel.
  constexpr int64_t kOfCluster = 4, kOfWait = 40 << 10, kOfMemory = 2, kOfLaunch = 160 << 10;
  const bool parts_P = size.P_bytes > 0 && !cut.adds_P;
  const bool parts_Q = size.Q_bytes > 0 && !cut.adds_Q;
  const int64_t adders = cut.adders();
  const auto added = [&](int64_t bytes) {
    if (bytes == 0 || adders == 1) return int64_t{0};
    return bytes * kOfCluster * (adders - 1) / adders + kOfWait;
  };
  const int64_t tiles = cut.row_tiles * cut.column_tiles;
  const int64_t of_P = parts_P ? 0 : added(size.P_bytes);
  const int64_t of_Q = parts_Q ? 0 : added(cut.column_tiles * size.Q_bytes);
  const int64_t parts = (parts_P ? cut.row_tiles * size.P_bytes : 0) +
                        (parts_Q ? cut.column_tiles * size.Q_bytes : 0);
  // While P of all rows but the last is added the next tiles are read.
  const int64_t read = tiles * size.stage_bytes + (cut.row_tiles - 1) * of_P +
                       cut.row_tiles * size.R_bytes / (cut.along_rows ? 1 : cut.cluster);
  const int64_t of_L2 = read + 2 * parts;  // written, and read again
  const int64_t of_memory = kOfMemory * (tiles * size.X_bytes + parts);
  return ceil_div(cut.row_blocks * cut.column_blocks, at_once) *
             (larger(of_L2, of_memory) + of_P + of_Q) +
         (parts_P + parts_Q) * kOfLaunch;
}

// Of a few cuts that keep many multiprocessors busy the cheapest: few parts of P want wide blocks,
// few of Q high ones. Clusters have 2, 4 or 8 blocks, which fill those groups.
inline LowRankCut choose_cut(const LowRankSize& size, int64_t at_once) {
  constexpr int64_t kTried = 8, kSizes[] = {1, 2, 4, 8};
  constexpr int64_t kMostSharing = 4;  // of R: more would wait for each other, for little
  LowRankCut best{};
  const bool P = size.P_bytes > 0, Q = size.Q_bytes > 0;
  const auto consider_clusters = [&](LowRankCut cut) {
    for (const int64_t blocks : kSizes) {
      for (const bool along_rows : {false, true}) {
        cut.cluster_of(static_cast<int>(blocks), along_rows, P, Q);
        const bool shares = Q && blocks <= kMostSharing && cut.column_blocks % blocks == 0;
        if (blocks > 1 && !(along_rows ? cut.adds_Q : cut.adds_P || shares)) continue;
        cut.cost = cost_of(cut, size, at_once);
        if (cut.cost < best.cost) best = cut;
      }
    }
  };
  const auto consider_rows = [&](int64_t column_tiles, int64_t wanted) {
    const int64_t row_tiles = ceil_div(size.row_tiles, wanted);
    consider_clusters({.row_tiles = row_tiles,
                       .column_tiles = column_tiles,
                       .row_blocks = ceil_div(size.row_tiles, row_tiles),
                       .column_blocks = ceil_div(size.column_tiles, column_tiles)});
  };
  const auto consider_columns = [&](int64_t column_tiles) {
    const int64_t column_blocks = ceil_div(size.column_tiles, column_tiles);
    const int64_t most = larger(1, smaller(size.row_tiles, at_once / column_blocks));
    consider_rows(column_tiles, most);
    if (size.Q_bytes == 0) return;
    for (const int64_t blocks : kSizes) {
      if (blocks < most) consider_rows(column_tiles, blocks);
    }
  };
  if (size.most_column_tiles > 0) {
    const int64_t most = smaller(size.most_column_tiles, size.column_tiles);
    for (int64_t tiles = 1; tiles <= most; ++tiles) consider_columns(tiles);
    return best;
  }
  const auto consider_blocks = [&](int64_t blocks) {
    consider_columns(ceil_div(size.column_tiles, blocks));
  };
  const int64_t first = smaller(larger(1, at_once / size.row_tiles), size.column_tiles);
  const int64_t last = smaller(first + kTried, size.column_tiles);
  for (int64_t blocks = first; blocks <= last; ++blocks) consider_blocks(blocks);
  for (const int64_t blocks : kSizes) consider_blocks(smaller(blocks, size.column_tiles));
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
  Hidden<T> P;
  Gradient<T> Q;
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

// As many stages as fit beside each other, and no more than the block has tiles. Q has room if it
// is wanted: without it a block may have any number of tiles of columns.
template <class Shape>
LowRankLayout layout_for(int L_terms, int R_terms, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t kMostStages = 8;
  const int64_t tiles = row_tiles * column_tiles;
  const int stage = Shape::kXBytes + L_terms * Shape::kLBytes, R = R_terms * Shape::kRBytes;
  const int left = kMostSharedBytes - kRSlots * (R + 16) - 16;
  const auto stages = static_cast<int>(smaller(left / (stage + 16), smaller(tiles, kMostStages)));
  const int R_tiles = stages * stage;
  const bool makes_Q = Shape::kQ && R_terms > 0;
  const int of_Q = makes_Q ? static_cast<int>(column_tiles) * Shape::kRows * Shape::kN * 4 : 0;
  const auto barriers = static_cast<int>(larger(R_tiles + kRSlots * R, of_Q));
  return {stages, stage, R_tiles, R, barriers, barriers + (stages + kRSlots + 1) * 16};
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
  const int R_rows = Shape::kRows / (cut.along_rows ? 1 : cut.cluster);  // that a block reads
  fill_maps(params.R, pass.R, R_rows, Shape::kRankBox, Shape::kSwizzle);
  params.layout =
      layout_for<Shape>(params.L_terms, params.R_terms, cut.row_tiles, cut.column_tiles);
  dim3 grid(static_cast<unsigned>(cut.column_blocks), static_cast<unsigned>(cut.row_blocks));
  if (params.along_rows) std::swap(grid.x, grid.y);
  arch::launch_dependent(low_rank_sm90_kernel<T, Shape>, grid, Shape::kThreads, params.layout.bytes,
                         stream, params, static_cast<unsigned>(cut.cluster));
}

// The kernel for a group of the ranks, the narrowest that holds it. Where P is wanted of dy and Q
// is not, that is one that makes both, up to the rank where they fit.
template <class T, int kWidth, Major kMajorL>
void launch_low_rank_width(const LowRankPass<T>& group, const LowRankCut& cut,
                           const LowRankParams<T>& params, Stream stream) {
  const auto launch = [&](auto shape) {
    launch_low_rank_group<T, decltype(shape)>(group, cut, params, stream);
  };
  if constexpr (kMajorL == Major::kK) {
    launch(LowRankShape<kWidth, true, false, kMajorL>{});
  } else if (params.L_terms == 0) {
    launch(LowRankShape<kWidth, false, true, kMajorL>{});
  } else {
    launch(LowRankShape<kWidth, true, kWidth <= kMostRankOfBoth, kMajorL>{});
  }
}

inline LowRankSize low_rank_size(int64_t M, int64_t C, int64_t r, int L_terms, int R_terms) {
  using Any = LowRankShape<16, true, false, Major::kK>;
  const int64_t rank = smaller(round_up(r, 16), kMostRank);
  return {.row_tiles = ceil_div(M, Any::kRows),
          .column_tiles = ceil_div(C, Any::kColumns),
          .X_bytes = Any::kXBytes,
          .stage_bytes = Any::kXBytes + L_terms * Any::kColumns * rank * 2,
          .R_bytes = R_terms * Any::kRows * rank * 2,
          .P_bytes = L_terms ? Any::kRows * rank * 4 : 0,
          .Q_bytes = R_terms ? Any::kColumns * rank * 4 : 0,
          .most_column_tiles = R_terms ? most_column_tiles(rank) : 0};
}

// By groups of ranks; P and Q of more than kMostRankOfBoth are passes of their own.
template <class T, Major kMajorL>
void launch_low_rank(const LowRankPass<T>& pass, const LowRankCut& cut, Gradients<T>& left,
                     const Allocator& scratch, Stream stream) {
  const int64_t M = pass.X.rows, C = pass.X.columns, r = pass.r;
  const int L_terms = terms_of(pass.L), R_terms = terms_of(pass.R);
  const bool parts_P = L_terms && !cut.adds_P, parts_Q = R_terms && !cut.adds_Q;
  float* const P = parts_P ? scratch.get<float>(cut.column_blocks * M * r) : nullptr;
  float* const Q = parts_Q ? scratch.get<float>(cut.row_blocks * C * r) : nullptr;
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
    params.along_rows = cut.along_rows, params.adds_P = cut.adds_P, params.adds_Q = cut.adds_Q;
    params.adders = static_cast<int>(cut.adders());
    params.hidden = pass.P, params.hidden_column = static_cast<int>(first);
    params.P_stride = r, params.P = P ? P + first : nullptr;
    params.Q_row = pass.Q_transposed ? 1 : r, params.Q_column = pass.Q_transposed ? C : 1;
    params.gradient = pass.Q.from(first * params.Q_column);
    params.Q_part = C * r, params.Q = Q ? Q + first * params.Q_column : nullptr;
    launch_low_rank_width<T, decltype(width)::value, kMajorL>(group, cut, params, stream);
  });
  if (Q) left.add({Q, static_cast<int>(cut.row_blocks)}, C * r, pass.Q);
  if (P) finish({P, static_cast<int>(cut.column_blocks)}, pass.P, stream);
}

template <class T, Major kMajorL>
void launch_low_rank(const LowRankPass<T>& pass, Gradients<T>& left, const Allocator& scratch,
                     Stream stream) {
  const int L_terms = terms_of(pass.L), R_terms = terms_of(pass.R);
  const auto size = low_rank_size(pass.X.rows, pass.X.columns, pass.r, L_terms, R_terms);
  LowRankCut cut = choose_cut(size, blocks_at_once(arch::multiprocessors()));
  // Blocks are the same then, and so is the order in which sums are added.
  if (switched_off(Mechanism::kCluster)) cut.cluster_of(1, false, L_terms > 0, R_terms > 0);
  launch_low_rank<T, kMajorL>(pass, cut, left, scratch, stream);
}

template <class T>
void launch_down(const Matrix<T>& x, const Split<T>& A, const Dropout& dropout, const Hidden<T>& h,
                 const Allocator& scratch, Stream stream) {
  const LowRankPass<T> pass{x, A, {}, A.value.rows, dropout, {}, false, h, {}};
  Gradients<T> none;
  launch_low_rank<T, Major::kK>(pass, none, scratch, stream);
}

// One pass over dy for both while both fit: then dy is read once, and dh has parts for every few of
// its columns; of wider ranks these parts would be more than another reading of dy.
template <class T>
void launch_up_grad(const UpGrad<T>& call, Gradients<T>& left, const Allocator& scratch,
                    Stream stream) {
  const int64_t r = call.B.value.columns;
  const Split<T> B = call.wants_dh ? call.B : Split<T>{};
  const LowRankPass<T> both{call.dy, B, call.h, r, {}, {}, false, call.dh, call.dB};
  if (r <= kMostRankOfBoth) return launch_low_rank<T, Major::kMN>(both, left, scratch, stream);
  LowRankPass<T> dh = both, dB = both;
  dh.R = dB.L = {};
  if (call.wants_dh) launch_low_rank<T, Major::kMN>(dh, left, scratch, stream);
  if (call.h.value.data) launch_low_rank<T, Major::kMN>(dB, left, scratch, stream);
}

template <class T>
void launch_down_grad(const Matrix<T>& x, const Split<T>& dh, const Dropout& dropout,
                      const KeptBits& kept, const Gradient<T>& dA, Gradients<T>& left,
                      const Allocator& scratch, Stream stream) {
  const LowRankPass<T> pass{x, {}, dh, dh.value.columns, dropout, kept, true, {}, dA};
  launch_low_rank<T, Major::kMN>(pass, left, scratch, stream);
}

}  // namespace lora_ext::sm90
