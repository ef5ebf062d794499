// dora_linear on the CPU. With x_d the elements of x that dropout drops, v = (x W^T - x_d W^T) /
// (1 - p): x W^T is there anyway, and x_d W^T is a fraction p of a product; without dropout v is
// x W^T itself. Backward, with
// c = 1 + (scale - 1) / (1 - p) and u = c * dy: dx = u W where x was kept and dy W, which is
// u W - (u - dy) W, where it was dropped.
#include "cpu/dora_linear.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <torch/library.h>

#include <vector>

#include "cpu/backend.h"
#include "cpu/column_scale.h"
#include "cpu/dora_linear_path.h"
#include "cpu/lora_linear.h"
#include "ops/base_product.h"
#include "ops/column_scale.h"
#include "ops/dora_linear.h"
#include "ops/operator.h"

namespace lora_ext {
namespace {

const DoraLinearKernels& dora_linear_kernels(const Tensor& x) {
  return cpu_kernels(x.scalar_type()).dora_linear;
}

DoraLinearPath dora_linear_path(int64_t M, int64_t K, at::ScalarType base, double dropout_p) {
  return choose_dora_linear_path(M, K, dropout_p, base == at::kBFloat16, has_fast_blas(base, M));
}

StridedWeight strided(const Tensor& weight) {
  return {weight.const_data_ptr(), weight.size(0), weight.size(1), weight.stride(0),
          weight.stride(1)};
}

// Rows or columns of adjacent elements, as StridedWeight wants them.
Tensor adjacent(const Tensor& weight) {
  return weight.stride(0) == 1 || weight.stride(1) == 1 ? weight : weight.contiguous();
}

// What dropout drops, chunk by chunk.
struct Dropped {
  std::vector<DroppedLists> chunks;
  std::vector<Tensor> memory;
};

// `x` [M, K]; without `with_values` room for sums takes the place of its elements.
Dropped list_dropped(const Tensor& x, int64_t M, int64_t K, const DropoutArgs& dropout,
                     const DoraLinearKernels& kernels, at::ScalarType compute, int64_t chunk_rows) {
  const int64_t blocks = at::divup(K, kDropoutBlock);
  const void* data = x.defined() ? x.const_data_ptr() : nullptr;
  const int64_t ldx = x.defined() ? x.stride(0) : 0;
  Dropped result;
  const Tensor keep = at::empty({chunk_rows, blocks * kDropoutSlots}, at::kShort);
  auto* words = reinterpret_cast<uint16_t*>(keep.data_ptr<int16_t>());
  for (int64_t first = 0; first < M; first += chunk_rows) {
    const int64_t rows = std::min(chunk_rows, M - first);
    constexpr int64_t kMinRows = 16;  // fewer do not pay for waking a thread
    const Tensor starts = at::empty({blocks * rows + 1}, at::kInt);
    int32_t* start = starts.data_ptr<int32_t>();
    at::parallel_for(0, rows, kMinRows, [&](int64_t begin, int64_t end) {
      kernels.count(dropout, K, first, rows, begin, end, words, start);
    });
    int32_t entries = 0;
    for (int64_t i = 0; i < blocks * rows; ++i) entries += std::exchange(start[i], entries);
    start[blocks * rows] = entries;
    const Tensor columns = at::empty({entries}, at::kByte);
    const Tensor values = at::empty({entries}, compute);
    at::parallel_for(0, rows, kMinRows, [&](int64_t begin, int64_t end) {
      kernels.list(data, ldx, K, first, rows, begin, end, words, start, columns.data_ptr<uint8_t>(),
                   values.data_ptr());
    });
    result.chunks.push_back({first, rows, start, columns.data_ptr<uint8_t>(), values.data_ptr()});
    result.memory.insert(result.memory.end(), {starts, columns, values});
  }
  return result;
}

// task(lists, part, scratch) for every chunk and every part of it.
template <class Task>
void for_each_part(const Dropped& dropped, int64_t parts, int64_t scratch_bytes, const Task& task) {
  const int64_t chunks = static_cast<int64_t>(dropped.chunks.size());
  at::parallel_for(0, chunks * parts, 1, [&](int64_t begin, int64_t end) {
    const Tensor scratch = at::empty({scratch_bytes}, at::kByte);
    for (int64_t i = begin; i < end; ++i) {
      task(dropped.chunks[i / parts], i % parts, scratch.data_ptr());
    }
  });
}

std::tuple<Tensor, Tensor> dora_linear_fwd_cpu(const DoraLinearCall& call) {
  check_dora_linear(call);
  const Tensor &x = call.x, &weight = call.weight;
  const int64_t K = weight.size(1), N = weight.size(0);
  const int64_t M = count_rows(x).expect_int();
  const bool drops = call.dropout_p > 0.0;
  if (drops && !dora_linear_path(M, K, x.scalar_type(), call.dropout_p).skips) {
    return dora_linear_fwd_composed(call);
  }
  auto [y, h, low_rank] = lora_linear_prepare_fwd(call.lora_linear(), /*return_h=*/false);
  Tensor v = at::empty(y.sizes(), y.options());
  if (y.numel() == 0) return {y, v};
  low_rank_forward(low_rank);
  Tensor z = v.view({M, N});
  DenseProduct(weight).write(z, low_rank.x);
  const auto compute = at::toOpMathType(x.scalar_type());
  if (!drops) {
    const Tensor scale = as_vector(call.scale, compute);
    column_scale_rows(x.scalar_type(),
                      {N, z.const_data_ptr(), N, scale.const_data_ptr(), nullptr,
                       low_rank.y.data_ptr(), /*adds=*/true},
                      M);
    return {y, v};
  }
  const auto& kernels = dora_linear_kernels(x);
  const Tensor W = adjacent(weight), scale_minus_1 = as_vector(call.scale, compute) - 1;
  const DropoutArgs dropout = dropout_args(call.dropout_p, call.rng_state);
  const DoraLinearForwardArgs args{strided(W), scale_minus_1.const_data_ptr(), dropout.survivor,
                                   z.data_ptr(), low_rank.y.data_ptr()};
  const int64_t panels = at::divup(N, kernels.panel_width),
                rows = rows_per_chunk(M, K, panels, at::get_num_threads());
  const Dropped dropped = list_dropped(low_rank.x, M, K, dropout, kernels, compute, rows);
  for_each_part(dropped, panels, kernels.scratch_bytes(rows),
                [&](const DroppedLists& lists, int64_t panel, void* scratch) {
                  kernels.forward(args, lists, panel, scratch);
                });
  return {y, v};
}

DoraGradients dora_linear_bwd_cpu(const DoraLinearBackwardCall& call, DoraMask mask) {
  check_dora_linear_bwd(call, mask);
  const Tensor& dy = call.dy;
  const int64_t K = call.lora_A.size(1), N = call.lora_B.size(0);
  const int64_t M = count_rows(dy).expect_int();
  const bool drops = call.dropout_p > 0.0;
  if (drops && !dora_linear_path(M, K, dy.scalar_type(), call.dropout_p).skips) {
    return dora_linear_bwd_composed(call, mask);
  }
  const auto compute = at::toOpMathType(dy.scalar_type());
  const DropoutArgs dropout = dropout_args(call.dropout_p, call.rng_state);
  const Tensor c = (as_vector(call.scale, compute) - 1) * dropout.survivor + 1;
  auto [u, dscale, dbias] =
      column_scale_bwd(dy, call.v, c, {mask[kDoraX], mask[kDoraScale], mask[kDoraBias]});
  auto [gradients, low_rank, done] =
      lora_linear_prepare_bwd(call.lora_linear(), lora_linear_mask(mask));
  auto& [dx, dweight, no_bias, dA, dB, no_lora_bias] = gradients;
  if (!done) low_rank_backward(low_rank);
  if (!done && mask[kDoraX]) {
    const Tensor& weight = *call.weight;
    const Tensor u_rows = u.view({M, N});
    DenseProduct(weight).add_gradient(low_rank.dx, u_rows);
    if (!drops) return {dx, dbias.to(dy.scalar_type()), dA, dB, dscale};
    const auto& kernels = dora_linear_kernels(dy);
    const Tensor W = adjacent(weight);
    const DoraLinearBackwardArgs args{strided(W), u_rows.const_data_ptr(),
                                      low_rank.dy.const_data_ptr(), low_rank.dy.stride(0),
                                      low_rank.dx.data_ptr()};
    // Several blocks of columns read the same rows of u - dy.
    constexpr int64_t kMaxBlocks = 4;
    const int64_t blocks = at::divup(K, kDropoutBlock), parts = at::divup(blocks, kMaxBlocks);
    const int64_t rows = rows_per_chunk(M, K, parts, at::get_num_threads());
    const Dropped dropped = list_dropped(Tensor(), M, K, dropout, kernels, compute, rows);
    for_each_part(dropped, parts, kernels.scratch_bytes(rows),
                  [&](const DroppedLists& lists, int64_t part, void* scratch) {
                    kernels.backward(args, lists, part * blocks / parts,
                                     (part + 1) * blocks / parts, scratch);
                  });
  }
  return {dx, dbias.to(dy.scalar_type()), dA, dB, dscale};
}

}  // namespace

std::pair<bool, std::string> explain_dora_linear_cpu(int64_t tokens, at::ScalarType base,
                                                     double dropout_p) {
  const DoraLinearPath path = dora_linear_path(tokens, /*K=*/kDropoutBlock, base, dropout_p);
  return {path.skips, path.reason};
}

TORCH_LIBRARY_IMPL(lora_ext, CPU, m) {
  m.impl("dora_linear_fwd", flat<&dora_linear_fwd_cpu>);
  m.impl("dora_linear_bwd", flat<&dora_linear_bwd_cpu>);
}

}  // namespace lora_ext
