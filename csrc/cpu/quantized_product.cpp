#include "cpu/quantized_product.h"

#include <ATen/ATen.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>

#include "cpu/backend.h"

namespace lora_ext {
namespace {

// How a result is cut: a thread makes tiles of it, and for each dequantizes the part of the matrix
// that it needs, `depth` terms of the sums at a time.
struct TileCut {
  int64_t rows, columns, depth;
};

int64_t rounded_up(int64_t size, int64_t unit) { return at::divup(size, unit) * unit; }

TileCut cut_for(int64_t M, int64_t columns, int64_t depth, at::ScalarType dtype) {
  // BLAS packs all of x for each tile: fewer columns do not pay for that.
  constexpr int64_t kMinColumns = 256;
  // Blocks of scales that are cut in two cost twice: cuts are multiples of the usual sizes.
  constexpr int64_t kUnit = 32;
  const int64_t threads = at::get_num_threads();
  int64_t most = 2048;
  if (at::isReducedFloatingType(dtype)) {
    // Sums are rounded where they are added to: all terms at once, in 8 MiB for all threads or what
    // that is too little for.
    const int64_t elements = std::min(int64_t{1} << 20, (int64_t{1} << 22) / threads);
    most = std::clamp<int64_t>(elements / depth / kUnit * kUnit, kUnit, most);
  } else {
    // As many terms as MKL's own blocks have.
    depth = std::min<int64_t>(depth, 384);
  }
  const int64_t parts = std::clamp<int64_t>(columns / kMinColumns, 1, threads);
  const int64_t width = std::min(most, rounded_up(at::divup(columns, parts), 2 * kUnit));
  const int64_t across = at::divup(columns, width);
  const int64_t down =
      std::clamp<int64_t>(M / kMinColumns, 1, std::max<int64_t>(1, threads / across));
  return {at::divup(M, down), width, depth};
}

// out = a b, or += it, out of parts of b: dequantize(k, n, depth, columns, room) makes a tensor
// [depth, columns] of one, in room.
template <class Dequantize>
void product_by_tiles(const Tensor& out, const Tensor& a, bool add, const Dequantize& dequantize) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  const TileCut cut = cut_for(M, N, K, out.scalar_type());
  const int64_t across = at::divup(N, cut.columns);
  at::parallel_for(0, at::divup(M, cut.rows) * across, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // threads have states of their own
    const Tensor room = at::empty({std::min(N, cut.columns) * cut.depth}, out.options());
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t m = tile / across * cut.rows, n = tile % across * cut.columns;
      const int64_t rows = std::min(M - m, cut.rows), columns = std::min(N - n, cut.columns);
      Tensor place = out.narrow(0, m, rows).narrow(1, n, columns);
      for (int64_t k = 0; k < K; k += cut.depth) {
        const int64_t depth = std::min(K - k, cut.depth);
        place.addmm_(a.narrow(0, m, rows).narrow(1, k, depth),
                     dequantize(k, n, depth, columns, room), /*beta=*/add || k > 0 ? 1 : 0);
      }
    }
  });
}

Tensor part_of(const Tensor& room, int64_t rows, int64_t columns) {
  return room.narrow(0, 0, rows * columns).view({rows, columns});
}

// Where the dense matrix is widened, and for all rows where ATen has nothing good instead.
bool widens_quantized(int64_t M, int64_t N, int64_t K, at::ScalarType dtype) {
  return !cpu_multiplies(dtype) || widens_product(M, N, K, dtype);
}

}  // namespace

QuantizedProduct::QuantizedProduct(const QuantizedFields& fields, at::ScalarType dtype)
    : matrix_(matrix_of(fields)), dtype_(dtype), kernels_(cpu_kernels(dtype).quantized) {}

void QuantizedProduct::few_rows(const Tensor& y, const Tensor& x, bool add) const {
  const int64_t M = x.size(0), N = matrix_.N, K = matrix_.K;
  const Tensor packed = at::empty({kernels_.few_rows_bytes(matrix_, M)}, at::kByte);
  const FewRowsArgs args{
      M, x.const_data_ptr(), x.stride(0), packed.data_ptr(), y.data_ptr(), y.stride(0), add};
  kernels_.pack_few_rows(matrix_, args);
  constexpr int64_t kMinElements = 32768;  // fewer do not pay for waking a thread
  at::parallel_for(0, N, at::divup(kMinElements, K), [&](int64_t begin, int64_t end) {
    kernels_.few_rows(matrix_, args, begin, end);
  });
}

void QuantizedProduct::forward(const Tensor& y, const Tensor& x, bool add) const {
  if (x.size(0) <= kFewRows) return few_rows(y, x, add);
  // Columns of y are rows of W.
  if (widens_quantized(x.size(0), matrix_.N, matrix_.K, dtype_)) {
    return product_of_widened_blocks(
        y, x, /*transposed=*/true, add, [&](int64_t k, int64_t n, const Tensor& block) {
          kernels_.dequantize_wide(matrix_, {n, block.size(1), k, block.size(0)}, block.data_ptr(),
                                   block.stride(1));
        });
  }
  product_by_tiles(y, x, add,
                   [&](int64_t k, int64_t n, int64_t depth, int64_t columns, const Tensor& room) {
                     const Tensor part = part_of(room, columns, depth);
                     kernels_.dequantize(matrix_, {n, columns, k, depth}, part.data_ptr(), depth);
                     return part.t();
                   });
}

void QuantizedProduct::add_gradient(const Tensor& dx, const Tensor& dy) const {
  if (widens_quantized(dy.size(0), matrix_.K, matrix_.N, dtype_)) {
    return product_of_widened_blocks(
        dx, dy, /*transposed=*/false, /*add=*/true, [&](int64_t n, int64_t k, const Tensor& block) {
          kernels_.dequantize_wide(matrix_, {n, block.size(0), k, block.size(1)}, block.data_ptr(),
                                   block.stride(0));
        });
  }
  product_by_tiles(dx, dy, /*add=*/true,
                   [&](int64_t n, int64_t k, int64_t depth, int64_t columns, const Tensor& room) {
                     const Tensor part = part_of(room, depth, columns);
                     kernels_.dequantize(matrix_, {n, depth, k, columns}, part.data_ptr(), columns);
                     return part;
                   });
}

Tensor QuantizedProduct::gradient(const Tensor& dy) const {
  const Tensor dx = at::zeros({dy.size(0), matrix_.K}, dy.options());
  add_gradient(dx, dy);
  return dx;
}

std::optional<BasePath> QuantizedProduct::path(int64_t M, bool forward) const {
  return quantized_base_path(M, matrix_.N, matrix_.K, dtype_, forward);
}

BasePath quantized_base_path(int64_t M, int64_t N, int64_t K, at::ScalarType dtype, bool forward) {
  if (forward && M <= kFewRows) {
    return {", quantized base by its codes",
            "; the codes of the base are read once, for all of these few rows"};
  }
  std::string reason = "; parts of the quantized base are dequantized in cache, for BLAS";
  if (forward ? widens_quantized(M, N, K, dtype) : widens_quantized(M, K, N, dtype))
    reason += "'s float32 product";
  return {", quantized base by parts", reason};
}

}  // namespace lora_ext
