// The functions of cuBLAS that benchmarks/kernels/libraries.h loads, for matrices in host memory:
// column-major, as its documentation defines cublasGemmEx. Of bf16, with sums in double. Tests
// plant a mistake with ADDED_TO_THE_FIRST, in the first element, LEFT_OUT, columns that are not
// written, or REFUSES.
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace {

double value_of(const uint16_t* matrix, int64_t at) {
  const uint32_t bits = uint32_t{matrix[at]} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

uint16_t rounded(double value) {
  const auto narrow = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
}

}  // namespace

extern "C" {

int cublasCreate_v2(void** handle) {
  static int instance;
  *handle = &instance;
  return 0;
}
int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
int cublasGetVersion_v2(void*, int* version) {
  *version = 1;
  return 0;
}

// C [m, n] = alpha op(A) op(B) + beta C
int cublasGemmEx(void*, int transposed_a, int transposed_b, int m, int n, int k, const void* alpha,
                 const void* a, int type_a, int lda, const void* b, int type_b, int ldb,
                 const void* beta, void* c, int type_c, int ldc, int compute_type, int algorithm) {
  constexpr int kBf16 = 14, kSumsInFloat = 68;
  const bool bf16 = type_a == kBf16 && type_b == kBf16 && type_c == kBf16;
  if (!bf16 || compute_type != kSumsInFloat || algorithm != -1) return 15;  // not supported
#if defined(REFUSES)
  return 15;
#endif
  if (lda < (transposed_a ? k : m) || ldb < (transposed_b ? n : k) || ldc < m) return 7;
  const auto *A = static_cast<const uint16_t*>(a), *B = static_cast<const uint16_t*>(b);
  auto* C = static_cast<uint16_t*>(c);
  const double scale = *static_cast<const float*>(alpha), kept = *static_cast<const float*>(beta);
#if defined(LEFT_OUT)
  n -= LEFT_OUT;
#endif
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0.0;
      for (int64_t l = 0; l < k; ++l) {
        sum += value_of(A, transposed_a ? l + i * lda : i + l * lda) *
               value_of(B, transposed_b ? j + l * ldb : l + j * ldb);
      }
      const double before = kept == 0.0 ? 0.0 : kept * value_of(C, i + j * ldc);
      C[i + j * ldc] = rounded(scale * sum + before);
    }
  }
#if defined(ADDED_TO_THE_FIRST)
  C[0] = rounded(value_of(C, 0) + ADDED_TO_THE_FIRST);
#endif
  return 0;
}
}
