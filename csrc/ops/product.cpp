#include "ops/product.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "cpu/capability.h"

namespace lora_ext {
namespace {

int64_t at_most(int64_t size, int64_t limit) { return std::min(size, limit); }

// Room for a widened block of a matrix [rows, columns], of adjacent elements where it has them.
Tensor block_of(int64_t rows, int64_t columns, bool transposed) {
  return transposed ? at::empty({columns, rows}, at::kFloat).t()
                    : at::empty({rows, columns}, at::kFloat);
}

Tensor corner(const Tensor& matrix, int64_t rows, int64_t columns) {
  return matrix.narrow(0, 0, rows).narrow(1, 0, columns);
}

// out = a b, or += it
void widened_product_out(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  product_of_widened_blocks(
      out, a, /*transposed=*/b.stride(0) == 1, add, [&](int64_t k, int64_t n, const Tensor& block) {
        block.copy_(b.narrow(0, k, block.size(0)).narrow(1, n, block.size(1)));
      });
}

bool widens(const Tensor& a, const Tensor& b) {
  return a.is_cpu() && widens_product(a.size(0), b.size(1), a.size(1), a.scalar_type());
}

}  // namespace

// The cut is the same for any number of threads, so that results are.
void product_of_widened_blocks(const Tensor& out, const Tensor& a, bool transposed, bool add,
                               const FillBlock& fill) {
  const int64_t M = out.size(0), N = out.size(1), K = a.size(1);
  // The blocks of a thread lie in its L2 cache; a small result leaves several threads something to
  // do, too.
  constexpr int64_t kRows = 256, kDepth = 512, kUnit = 16;
  const int64_t most = M < 128 || (M <= kRows && N <= 512) ? 128 : 256;
  const int64_t columns_of_blocks = at::divup(N, most);
  const int64_t width = at::divup(at::divup(N, columns_of_blocks), kUnit) * kUnit;
  const int64_t height = at_most(M, kRows), span = at_most(K, kDepth), breadth = at_most(N, width);
  at::parallel_for(0, at::divup(M, kRows) * columns_of_blocks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;  // threads have states of their own
    const Tensor room_a = block_of(height, span, a.stride(0) == 1),
                 room_b = block_of(span, breadth, transposed),
                 room = block_of(height, breadth, out.stride(0) == 1);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t m = block / columns_of_blocks * kRows, n = block % columns_of_blocks * width;
      const int64_t rows = at_most(M - m, kRows), columns = at_most(N - n, width);
      const Tensor place = out.narrow(0, m, rows).narrow(1, n, columns);
      const Tensor sums = corner(room, rows, columns);
      if (add) sums.copy_(place);
      for (int64_t k = 0; k < K; k += kDepth) {
        const int64_t depth = at_most(K - k, kDepth);
        const Tensor wide_a = corner(room_a, rows, depth), wide_b = corner(room_b, depth, columns);
        wide_a.copy_(a.narrow(0, m, rows).narrow(1, k, depth));
        fill(k, n, wide_b);
        sums.addmm_(wide_a, wide_b, /*beta=*/add || k > 0 ? 1 : 0);
      }
      place.copy_(sums);
    }
  });
}

bool widens_product(int64_t M, int64_t N, int64_t K, at::ScalarType dtype) {
#if defined(__x86_64__)  // not measured elsewhere
  if (!at::isReducedFloatingType(dtype) || cpu_multiplies_faster(dtype) || K == 0) return false;
  // Fewer rows or columns do not pay for widening the other operand: oneDNN has kernels of bf16 for
  // AVX-512; what ATen has otherwise is scalar code, but for a vector.
  const bool has_kernels = dtype == at::kBFloat16 && cpu_capability() >= CpuCapability::Avx512;
  const int64_t least = cpu_multiplies(dtype) ? 64 : has_kernels ? 8 : 2;
  return std::min(M, N) >= least;
#else
  return false;
#endif
}

Tensor product(const Tensor& a, const Tensor& b) {
  if (!widens(a, b)) return at::mm(a, b);
  const Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  widened_product_out(out, a, b, /*add=*/false);
  return out;
}

void product_out(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (widens(a, b)) return widened_product_out(out, a, b, /*add=*/false);
  out.addmm_(a, b, /*beta=*/0);
}

void add_product_(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (widens(a, b)) return widened_product_out(out, a, b, /*add=*/true);
  out.addmm_(a, b);
}

Tensor linear_product(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const Tensor rows = as_rows(x), columns = weight.t();
  if (!widens(rows, columns)) return at::linear(x, weight, bias);
  const Tensor y = at::empty_symint(with_width(x, weight.sym_size(0)), x.options());
  const Tensor out = y.view({rows.size(0), columns.size(1)});
  if (bias.has_value()) out.copy_(bias->expand_as(out));
  widened_product_out(out, rows, columns, /*add=*/bias.has_value());
  return y;
}

}  // namespace lora_ext
