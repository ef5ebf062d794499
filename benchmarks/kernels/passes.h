// What is checked and timed: the passes of lora_linear one by one, the whole calls that are made of
// them, and cuBLAS's products, which a frozen layer runs.
#pragma once

#include <string>
#include <vector>

#include "full_problem.h"
#include "libraries.h"
#include "row_passes.h"

namespace gpu_bench {

template <class TA>
class Passes {
 public:
  using P = Problem<TA>;
  Passes(P& problem, const Cublas& cublas)
      : p_(problem), cublas_(cublas), family_(passes_of<Bf16>(problem.c.family)), rows_(problem) {}

  std::vector<Pass> list() {
    std::vector<Pass> passes;
    add_copy(passes);
    if (cublas_.there()) add_frozen(passes);
    add_products(passes);
    add_low_rank(passes);
    add_calls(passes, "fused", true);
    if (cublas_.there()) add_calls(passes, "hybrid", false);
    rows_.add_to(passes);
    return passes;
  }

 private:
  // ---- Sizes, in bytes and operations ----------------------------------------------------------
  double M() const { return double(p_.c.M); }
  double K() const { return double(p_.c.K); }
  double N() const { return double(p_.c.N); }
  double r() const { return p_.c.r; }
  double base_flops() const { return 2 * M() * K() * N(); }
  double base_bytes() const { return 2 * (M() * K() + K() * N() + M() * N()); }

  Error y_error(const Expected& expected, double roundings) const {
    const Made<Bf16> made{p_.y, 1, p_.c.M, p_.c.N, false};
    return error_of("y", made, 1.0, expected, roundings * kRounding + of_sum(p_.c.K + p_.c.r));
  }
  Error dx_error(const Expected& expected, double roundings) const {
    const Made<Bf16> made{p_.dx, 1, p_.c.M, p_.c.K, false};
    return error_of("dx", made, 1.0, expected, roundings * kRounding + of_sum(p_.c.N + p_.c.r));
  }

  // What memory gives: a pass over x and dy can hardly read faster than this reads and writes.
  void add_copy(std::vector<Pass>& passes) {
    const auto bytes = static_cast<size_t>(p_.c.M * p_.c.K) * sizeof(Bf16);
    passes.push_back(
        {"copy x", "", 0, 2.0 * double(bytes),
         [=, this] { check(cudaMemcpyAsync(p_.dx, p_.x, bytes, cudaMemcpyDeviceToDevice)); },
         [] { return std::vector<Error>{}; }});
  }

  void add_frozen(std::vector<Pass>& passes) {
    const auto [M, K, N] = std::tuple(p_.c.M, p_.c.K, p_.c.N);
    passes.push_back({"cublas y", "", base_flops(), base_bytes(),
                      [=, this] { cublas_.forward(p_.x, p_.weight, p_.y, M, K, N, 0.0f); },
                      [this] { return std::vector{y_error(p_.base_y, 1)}; }});
    passes.push_back({"cublas dx", "", base_flops(), base_bytes(),
                      [=, this] { cublas_.backward(p_.dy, p_.weight, p_.dx, M, K, N, 0.0f); },
                      [this] { return std::vector{dx_error(p_.base_dx, 1)}; }});
  }

  // ---- The product that ends forward and backward ----------------------------------------------
  Product<Bf16> y_product(bool low_rank) const {
    Product<Bf16> product{};
    product.segments[product.count++] = {p_.x_matrix(), p_.weight_matrix()};
    if (low_rank) add_segments(product, p_.scaled_h, p_.B, p_.of_B);
    product.out = p_.y, product.M = p_.c.M, product.N = p_.c.N;
    return product;
  }
  Product<Bf16> dx_product(bool low_rank) const {
    Product<Bf16> product{};
    if (low_rank) add_segments(product, p_.split_dh, p_.A, p_.of_A);
    product.masked = p_.dropout.enabled ? product.count : 0;
    product.dropout = p_.dropout;
    product.segments[product.count++] = {p_.dy_matrix(), p_.weight_matrix()};
    product.out = p_.dx, product.M = p_.c.M, product.N = p_.c.K;
    return product;
  }

  void add_products(std::vector<Pass>& passes) {
    for (const bool low_rank : {false, true}) {
      const std::string suffix = low_rank ? "" : " alone";
      const double flops = base_flops() + (low_rank ? 2 * M() * N() * r() : 0);
      const double more = low_rank ? 2 * r() * (M() + N()) : 0;
      const auto run = [this](Product<Bf16> product, BLayout layout) {
        launch_product(family_, product, layout, nullptr);
      };
      passes.push_back({"product y" + suffix, "cublas y", flops, base_bytes() + more,
                        [=, this] { run(y_product(low_rank), BLayout::kColumns); },
                        [=, this] {
                          return std::vector{low_rank ? y_error(p_.want_y, 2)
                                                      : y_error(p_.base_y, 1)};
                        }});
      passes.push_back({"product dx" + suffix, "cublas dx", flops, base_bytes() + more,
                        [=, this] { run(dx_product(low_rank), BLayout::kRows); },
                        [=, this] {
                          return std::vector{low_rank ? dx_error(p_.want_dx, 2)
                                                      : dx_error(p_.base_dx, 1)};
                        }});
    }
  }

  // ---- The low-rank passes ---------------------------------------------------------------------
  template <class T>
  static Made<T> made(const T* data, int parts, int64_t rows, int64_t columns,
                      bool transposed = false) {
    return {data, parts, rows, columns, transposed};
  }

  void add_low_rank(std::vector<Pass>& passes) {
    const auto [M, K, N, r] = std::tuple(p_.c.M, p_.c.K, p_.c.N, int64_t{p_.c.r});
    const float kept = survivor(p_.dropout);
    const double stored = sizeof(TA) == 2 ? kRounding : 0;
    const double of_x = 2 * this->M() * this->K(), of_dy = 2 * this->M() * this->N();
    passes.push_back({"down", "cublas y", of_x * r, of_x + 2.0 * r * K + 6.0 * M * r,
                      [=, this] {
                        const Allocator memory = scratch();
                        const Hidden<Bf16> h =
                            hidden<Bf16>(M, r, copies(p_.of_B), kept, nullptr, {kScaling, nullptr},
                                         p_.h, false, memory);
                        family_.down(p_.x_matrix(), p_.A, p_.dropout, h, memory, nullptr);
                      },
                      [=, this] {
                        return std::vector{
                            error_of("h", made(p_.h, 1, M, r), 1.0, p_.want_h, of_sum(K) + kSplit)};
                      }});
    passes.push_back(
        {"up_grad", "cublas dx", 2 * of_dy * r, of_dy + 6.0 * N * r + 12.0 * M * r,
         [=, this] {
           const Allocator memory = scratch();
           dh_ = memory.get<float>(M * r);
           const Hidden<Bf16> dh = hidden<Bf16>(M, r, copies(p_.of_A), kept, nullptr,
                                                {kScaling, nullptr}, dh_, true, memory);
           const Gradient<Bf16> dB = gradient<Bf16>(p_.dB, {kScaling, nullptr}, nullptr);
           Gradients<Bf16> left;
           family_.up_grad({p_.dy_matrix(), p_.B, p_.split_h, true, dh, dB}, left, memory, nullptr);
           left.launch(nullptr);
         },
         [=, this] {
           return std::vector{
               error_of("dh", made(dh_, 1, M, r), kScaling, p_.want_dh, of_sum(N) + kSplit),
               error_of("dB", made(p_.dB, 1, N, r), 1.0, p_.want_dB, of_sum(M) + kSplit + stored)};
         }});
    passes.push_back({"down_grad", "cublas dx", of_x * r, of_x + 4.0 * K * r + 4.0 * M * r,
                      [=, this] {
                        Gradients<Bf16> left;
                        family_.down_grad(p_.x_matrix(), p_.split_dh.columns(0, r), p_.dropout, {},
                                          gradient<Bf16>(p_.dA, {1.0f, nullptr}, nullptr), left,
                                          scratch(), nullptr);
                        left.launch(nullptr);
                      },
                      [=, this] {
                        return std::vector{error_of("dA", made(p_.dA, 1, K, r, true), 1.0,
                                                    p_.want_dA, of_sum(M) + kSplit + stored)};
                      }});
  }

  // ---- Whole calls -----------------------------------------------------------------------------
  void forward(bool fused) {
    const auto [M, K, N] = std::tuple(p_.c.M, p_.c.K, p_.c.N);
    const Matrix<Bf16> weight{fused ? p_.weight : nullptr, N, K, K};
    run_forward(ForwardCall<Bf16, TA>{p_.x_matrix(),
                                      {weight},
                                      nullptr,
                                      p_.lora_A,
                                      p_.lora_B,
                                      p_.c.r,
                                      kScaling,
                                      nullptr,
                                      p_.dropout,
                                      p_.y,
                                      p_.h},
                scratch(), nullptr, p_.c.family);
    if (!fused) cublas_.forward(p_.x, p_.weight, p_.y, M, K, N, 1.0f);
  }
  // h was saved by the forward.
  void backward(bool fused) {
    const auto [M, K, N] = std::tuple(p_.c.M, p_.c.K, p_.c.N);
    const Matrix<Bf16> weight{fused ? p_.weight : nullptr, N, K, K};
    run_backward(BackwardCall<Bf16, TA>{p_.dy_matrix(),
                                        p_.x_matrix(),
                                        {weight},
                                        p_.saved_h,
                                        p_.lora_A,
                                        p_.lora_B,
                                        p_.c.r,
                                        kScaling,
                                        nullptr,
                                        p_.dropout,
                                        p_.dx,
                                        p_.dA,
                                        p_.dB},
                 scratch(), nullptr, p_.c.family);
    if (!fused) cublas_.backward(p_.dy, p_.weight, p_.dx, M, K, N, 1.0f);
  }

  void add_calls(std::vector<Pass>& passes, const std::string& name, bool fused) {
    const auto [M, K, N, r] = std::tuple(p_.c.M, p_.c.K, p_.c.N, int64_t{p_.c.r});
    const double roundings = fused ? 2 : 3;
    const double of_A = 2 * this->M() * this->K() * r, of_B = 2 * this->M() * this->N() * r;
    const double adapters = sizeof(TA) * (this->K() + this->N()) * r, of_h = 4 * this->M() * r;
    passes.push_back({name + " forward", "cublas y", base_flops() + of_A + of_B,
                      base_bytes() + adapters + of_h, [=, this] { forward(fused); },
                      [=, this] {
                        return std::vector{
                            error_of("h", made(p_.h, 1, M, r), 1.0, p_.want_h, of_sum(K) + kSplit),
                            y_error(p_.want_y, roundings)};
                      }});
    const double again = p_.dropout.enabled ? of_A : 0;
    const double stored = sizeof(TA) == 2 ? kRounding : 0;
    const double bytes = base_bytes() + 2 * this->M() * this->K() + 2 * adapters + of_h;
    passes.push_back({name + " backward", "cublas dx", base_flops() + 2 * (of_A + of_B) + again,
                      bytes, [=, this] { backward(fused); },
                      [=, this] {
                        return std::vector{
                            dx_error(p_.want_dx, roundings),
                            error_of("dA", made(p_.dA, 1, K, r, true), 1.0, p_.want_dA,
                                     of_sum(M) + of_sum(N) + 2 * kSplit + stored),
                            error_of("dB", made(p_.dB, 1, N, r), 1.0, p_.want_dB,
                                     of_sum(M) + of_sum(K) + 2 * kSplit + stored)};
                      }});
  }

  Allocator scratch() {
    p_.scratch.reset();
    return p_.scratch.allocator();
  }

  P& p_;
  const Cublas& cublas_;
  const Family<Bf16>& family_;
  RowPasses<TA> rows_;
  float* dh_ = nullptr;  // [M, r], of up_grad
};

}  // namespace gpu_bench
