// What a family of kernels (sm_80, sm_90a) provides: the passes over x, dy and the weight that
// forward and backward are made of. lora_linear_run.h puts them together.
#pragma once

#include "kept_bits.h"
#include "lora_linear_multi.h"
#include "lora_linear_sums.h"

namespace lora_ext {

// ---- The product that ends forward and backward: y or dx ---------------------------------------
//
// Several segments into the same sums:
//
//   out [M, N] = round(sum over segments of A_i [M, K_i] B_i [K_i, N] + bias)
//
// Forward is (x, weight), (h, lora_B), of fp16 the other way round; backward's dx is (dh, lora_A),
// dropout's mask, (dy, weight). Layers of one x have a product each in forward, and one of all
// their segments in backward.

constexpr int kLayerSegments = 3;  // of one layer, whose adapter may have a remainder
constexpr int kMaxSegments = kLayerSegments * kMostTogether;

// B is read as it lies: kColumns rows are columns of B (a weight [N, K] in forward), kRows rows are
// rows of B (the same weight in backward). Of a weight that lies transposed the other way round.
enum class BLayout { kColumns, kRows };

template <class T>
struct Segment {
  Matrix<T> a;  // [M, K_i]
  Matrix<T> b;  // [N, K_i] or [K_i, N], by the layout
};

// What multiplies the sums of segments: both, powers of two; or null.
LORA_EXT_DEVICE float back_of(const float* const (&back)[2]) {
  return (back[0] ? *back[0] : 1.0f) * (back[1] ? *back[1] : 1.0f);
}

template <class T>
struct Product {
  Segment<T> segments[kMaxSegments];
  int count;
  bool aligned;  // every matrix is
  int scaled;    // of fp16: the sums of the first `scaled` segments are multiplied by `back`
  const float* back[2];  // those that are not null
  int masked;  // dropout is applied to the sums of the first `masked` segments, afterwards
  Dropout dropout;
  KeptBits kept;      // its decisions, where another pass has made them; or none
  const float* bias;  // [N] or null
  T* out;             // [M, N], contiguous
  int64_t M, N;
};

// Of the same M and layout, with no more segments than kMaxSegments. Several have no masks.
template <class T>
struct Products {
  const Product<T>* data;
  int count;  // 1 to kMostTogether
};

// ---- The low-rank passes -----------------------------------------------------------------------

// A matrix as tensor cores read it: 16-bit rows that begin at multiples of 16 bytes, and of a float
// one also what rounding it to 16 bits left.
template <class T>
struct Split {
  Matrix<T> value;
  const T* remainder;           // laid out like value; or null
  const float* back = nullptr;  // what it is to be multiplied by, of fp16; or null: by nothing

  Matrix<T> rest() const { return {remainder, value.rows, value.columns, value.stride}; }
  // `count` columns from `first`
  Split columns(int64_t first, int64_t count) const {
    return {{value.data + first, value.rows, count, value.stride},
            remainder ? remainder + first : nullptr,
            back};
  }
  Split rows(int64_t first, int64_t count) const {
    const int64_t skipped = first * value.stride;
    return {{value.data + skipped, count, value.columns, value.stride},
            remainder ? remainder + skipped : nullptr,
            back};
  }
};

// [count, rows, columns] in float, to be added in their order.
struct Parts {
  float* data;
  int count;
};

template <class T>
class Gradients;  // lora_linear_elementwise.h: those whose parts are still to be added

template <class T>
struct UpGrad {
  Matrix<T> dy;  // [M, N]
  Split<T> B;    // [N, r]
  Split<T> h;    // [M, r]; data null if dB is not wanted
  bool wants_dh;
  Hidden<T> dh;    // of dy B [M, r]
  Gradient<T> dB;  // of dy^T h [N, r]
};

template <class T>
struct Family {
  // h of the sums dropout(x) A^T [M, r], which are without dropout's factor
  void (*down)(const Matrix<T>& x, const Split<T>& A, const Dropout& dropout, const Hidden<T>& h,
               const Allocator& scratch, Stream stream);
  void (*up_grad)(const UpGrad<T>& call, Gradients<T>& left, const Allocator& scratch,
                  Stream stream);
  // dA of the sums dh^T dropout(x) [r, K], which are without dropout's factor; dropout's decisions
  // into `kept` unless it is none
  void (*down_grad)(const Matrix<T>& x, const Split<T>& dh, const Dropout& dropout,
                    const KeptBits& kept, const Gradient<T>& dA, Gradients<T>& left,
                    const Allocator& scratch, Stream stream);
  void (*products)(const Products<T>& call, BLayout layout, Stream stream);
};

namespace sm80 {

template <class T>
void launch_down(const Matrix<T>& x, const Split<T>& A, const Dropout& dropout, const Hidden<T>& h,
                 const Allocator& scratch, Stream stream);
template <class T>
void launch_up_grad(const UpGrad<T>& call, Gradients<T>& left, const Allocator& scratch,
                    Stream stream);
template <class T>
void launch_down_grad(const Matrix<T>& x, const Split<T>& dh, const Dropout& dropout,
                      const KeptBits& kept, const Gradient<T>& dA, Gradients<T>& left,
                      const Allocator& scratch, Stream stream);
template <class T>
void launch_products(const Products<T>& call, BLayout layout, Stream stream);

template <class T>
constexpr Family<T> kFamily{&launch_down<T>, &launch_up_grad<T>, &launch_down_grad<T>,
                            &launch_products<T>};

}  // namespace sm80

// For matrices whose rows TMA can read, and whose numbers of columns are multiples of 8:
// cuda/lora_linear_path.h takes this family for no others.
namespace sm90 {

template <class T>
void launch_down(const Matrix<T>& x, const Split<T>& A, const Dropout& dropout, const Hidden<T>& h,
                 const Allocator& scratch, Stream stream);
template <class T>
void launch_up_grad(const UpGrad<T>& call, Gradients<T>& left, const Allocator& scratch,
                    Stream stream);
template <class T>
void launch_down_grad(const Matrix<T>& x, const Split<T>& dh, const Dropout& dropout,
                      const KeptBits& kept, const Gradient<T>& dA, Gradients<T>& left,
                      const Allocator& scratch, Stream stream);
template <class T>
void launch_products(const Products<T>& call, BLayout layout, Stream stream);

template <class T>
constexpr Family<T> kFamily{&launch_down<T>, &launch_up_grad<T>, &launch_down_grad<T>,
                            &launch_products<T>};

}  // namespace sm90

}  // namespace lora_ext
