// The product of the sm_90a family: its tensor maps, tiles and grids. Host code without torch.
#pragma once

#include <algorithm>
#include <iterator>

#include "product_sm90.h"
#include "switches.h"
#include "tensor_map_sm90.h"

namespace lora_ext::sm90 {

// By clusters of so many blocks, as many as there are multiprocessors.
template <class T, class Shape, Major kMajorB>
void launch_product_tiles(const Product<T>& product, int cluster, int multiprocessors,
                          Stream stream) {
  ProductParams<T> params{};
  for (int s = 0; s < product.count; ++s) {
    const auto& [a, b] = product.segments[s];
    params.a[s] = tensor_map(a, Shape::kM, Shape::kK, Swizzle::k128);
    params.b[s] =
        tensor_map(b, Shape::template kBoxRows<kMajorB> / cluster, Shape::kK, Swizzle::k128);
    params.depth[s] = a.columns;
  }
  params.count = product.count, params.masked = product.masked;
  params.dropout = product.dropout, params.kept = product.kept;
  params.bias = product.bias;
  const Matrix<T> out{product.out, product.M, product.N, product.N};
  using Boxes = StoreBoxes<Shape::kN>;
  params.out = tensor_map(out, Boxes::kRows, Boxes::kWidth, Swizzle::k128);
  params.M = product.M, params.N = product.N;
  params.report = arch::wait_report();
  const int64_t tiles = TileWalk<Shape>::tiles(product.M, product.N, cluster);
  const int64_t clusters = std::min<int64_t>(tiles, multiprocessors / cluster);
  arch::launch_dependent(product_sm90_kernel<T, Shape, kMajorB>,
                         dim3(static_cast<unsigned>(clusters * cluster)), Shape::kThreads,
                         Shape::kSharedBytes, stream, params, static_cast<unsigned>(cluster));
}

using WideProduct = ProductShape<256, 4>;
using MiddleProduct = ProductShape<128, 6>;
using NarrowProduct = ProductShape<64, 8>;

// Multiprocessors come in pairs, so that every one has a neighbour.
inline int most_cluster() { return switched_off(Mechanism::kCluster) ? 1 : 2; }

// How a result is cut, and what it costs: cycles of the busiest multiprocessor for 64 columns of A.
struct ProductTiles {
  int columns, cluster;
  int64_t cycles;
};

// The cheapest; among equals the widest, and alone.
inline ProductTiles choose_tiles(int64_t M, int64_t N, int64_t multiprocessors, int most_cluster) {
  // In a cycle the tensor cores of a multiprocessor multiply and add so often, and L2 brings some
  // 46 bytes to it while all of them read (fast.cu's kernel without clusters needs as many).
  constexpr int64_t kMultiplyAdds = 2048, kBytes = 46;
  ProductTiles best{};
  const auto consider = [&]<class Shape>(Shape) {
    for (int cluster = 1; cluster <= most_cluster; ++cluster) {
      const int64_t tiles = TileWalk<Shape>::tiles(M, N, cluster);
      const int64_t clusters = multiprocessors / cluster;
      if (clusters == 0 || row_tiles<Shape>(M) < cluster) continue;
      const int64_t multiply = int64_t{Shape::kM} * Shape::kN * Shape::kK / kMultiplyAdds;
      const int64_t load = (Shape::kABytes + Shape::kBBytes / cluster) / kBytes;
      const int64_t cycles = (tiles + clusters - 1) / clusters * std::max(multiply, load);
      if (best.columns == 0 || cycles < best.cycles) best = {Shape::kN, cluster, cycles};
    }
  };
  consider(WideProduct{}), consider(MiddleProduct{}), consider(NarrowProduct{});
  return best;
}

template <class T, Major kMajorB>
void launch_product_of_layout(const Product<T>& product, Stream stream) {
  const int multiprocessors = arch::multiprocessors();
  const auto [columns, cluster, cycles] =
      choose_tiles(product.M, product.N, multiprocessors, most_cluster());
  const auto launch = columns == WideProduct::kN ? launch_product_tiles<T, WideProduct, kMajorB>
                      : columns == MiddleProduct::kN
                          ? launch_product_tiles<T, MiddleProduct, kMajorB>
                          : launch_product_tiles<T, NarrowProduct, kMajorB>;
  launch(product, cluster, multiprocessors, stream);
}

template <class T>
void launch_product(const Product<T>& product, BLayout layout, Stream stream) {
  if (layout == BLayout::kColumns) {
    launch_product_of_layout<T, Major::kK>(product, stream);
  } else {
    launch_product_of_layout<T, Major::kMN>(product, stream);
  }
}

}  // namespace lora_ext::sm90
