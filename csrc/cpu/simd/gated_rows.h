// f(e) * g and its gradients on a range of rows, rounded once. f(e) = e s(u), s being the sigmoid
// and u = e (SiLU) or u = 2 sqrt(2 / pi) (e + 0.044715 e^3) (GELU by tanh).
#pragma once

#include "../gated_kernels.h"
#include "rows.h"

namespace lora_ext::LORA_EXT_ISA {

using Floats = Vec<float>::Reg;

// Within an ulp or two: 2^n e^r, |r| <= ln(2) / 2, and e^r by eight terms of its series. Infinite
// where float is too small, 0 where the result is.
inline Floats exp_of(Floats a) {
  using V = Vec<float>;
  constexpr float kSeries[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  a = V::clamp(a, -150.0f, 150.0f);
  const Floats n = V::round(V::mul(a, V::set1(1.44269504f)));
  // ln(2) in two parts, of which the first is exact times any n.
  Floats r = V::fma(n, V::set1(-0.693145751953125f), a);
  r = V::fma(n, V::set1(-1.42860677e-6f), r);
  Floats sum = V::set1(1.0f / 5040);
  for (const float term : kSeries) sum = V::fma(sum, r, V::set1(term));
  return V::times_power(sum, n);
}

constexpr float kTwoRootTwoOverPi = 1.59576912f;
constexpr float kCubic = 0.044715f;

// 1 + e^-u
template <bool kGeluTanh>
inline Floats one_plus_exp(Floats e) {
  using V = Vec<float>;
  Floats minus_u = V::mul(e, V::set1(-1.0f));
  if constexpr (kGeluTanh) {
    const Floats cubic = V::fma(V::mul(V::mul(e, e), V::set1(kCubic)), e, e);
    minus_u = V::mul(cubic, V::set1(-kTwoRootTwoOverPi));
  }
  return V::add(exp_of(minus_u), V::set1(1.0f));
}

template <class T, bool kGeluTanh>
void gated_rows_of(const GatedArgs& args, int64_t begin, int64_t end) {
  using V = Vec<float>;
  for (int64_t m = begin; m < end; ++m) {
    const T* e = static_cast<const T*>(args.e) + m * args.lde;
    const T* g = static_cast<const T*>(args.g) + m * args.ldg;
    T* out = static_cast<T*>(args.out) + m * args.ldout;
    for (int64_t j = 0; j < args.N; j += V::kWidth) {
      const int lanes = static_cast<int>(at_most(args.N - j, V::kWidth));
      const Floats value = load_lanes<float>(e + j, lanes);
      const Floats f = V::div(value, one_plus_exp<kGeluTanh>(value));
      store_lanes<float>(out + j, V::mul(f, load_lanes<float>(g + j, lanes)), lanes);
    }
  }
}

template <class T, bool kGeluTanh>
void gated_backward_rows_of(const GatedBackwardArgs& args, int64_t begin, int64_t end) {
  using V = Vec<float>;
  const Floats one = V::set1(1.0f);
  for (int64_t m = begin; m < end; ++m) {
    const T* da = static_cast<const T*>(args.da) + m * args.ldda;
    const T* e = static_cast<const T*>(args.e) + m * args.lde;
    const T* g = static_cast<const T*>(args.g) + m * args.ldg;
    T* de = static_cast<T*>(args.de) + m * args.ldde;
    T* dg = static_cast<T*>(args.dg) + m * args.lddg;
    for (int64_t j = 0; j < args.N; j += V::kWidth) {
      const int lanes = static_cast<int>(at_most(args.N - j, V::kWidth));
      const Floats value = load_lanes<float>(e + j, lanes);
      const Floats gradient = load_lanes<float>(da + j, lanes);
      const Floats df = V::mul(gradient, load_lanes<float>(g + j, lanes));
      const Floats s = V::div(one, one_plus_exp<kGeluTanh>(value));
      // f' = s + e s (1 - s) u'
      Floats slope = V::mul(value, V::fma(s, V::set1(-1.0f), one));
      if constexpr (kGeluTanh) {
        const Floats square = V::mul(V::mul(value, value), V::set1(3 * kCubic));
        slope = V::mul(slope, V::mul(V::add(square, one), V::set1(kTwoRootTwoOverPi)));
      }
      const Floats derivative = V::mul(s, V::add(slope, one));
      store_lanes<float>(dg + j, V::mul(gradient, V::mul(value, s)), lanes);
      store_lanes<float>(de + j, V::mul(df, derivative), lanes);
    }
  }
}

template <class T>
void gated_rows(const GatedArgs& args, int64_t begin, int64_t end) {
  args.gelu_tanh ? gated_rows_of<T, true>(args, begin, end)
                 : gated_rows_of<T, false>(args, begin, end);
}

template <class T>
void gated_backward_rows(const GatedBackwardArgs& args, int64_t begin, int64_t end) {
  args.gelu_tanh ? gated_backward_rows_of<T, true>(args, begin, end)
                 : gated_backward_rows_of<T, false>(args, begin, end);
}

template <class T>
constexpr GatedKernels gated_kernels() {
  return {.forward_rows = gated_rows<T>, .backward_rows = gated_backward_rows<T>};
}
template <>
constexpr GatedKernels gated_kernels<double>() {
  return {};
}

}  // namespace lora_ext::LORA_EXT_ISA
