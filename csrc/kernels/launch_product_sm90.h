// The product of the sm_90a family: its tensor maps, tiles and grids. Host code without torch.
#pragma once

#include <algorithm>
#include <iterator>
#include <limits>
#include <span>

#include "product_sm90.h"
#include "switches.h"
#include "tensor_map_sm90.h"

namespace lora_ext::sm90 {

// What a kernel is given that makes these products by tiles of this shape.
template <class Params, class Shape, Major kMajorB, class T>
Params product_params(const Products<T>& products, int cluster) {
  Params params{};
  int segments = 0;
  for (int i = 0; i < products.count; ++i) {
    const Product<T>& product = products.data[i];
    if (product.scaled > 0) params.scaled[i] = segments + product.scaled;
    std::copy(std::begin(product.back), std::end(product.back), params.back[i]);
    for (int s = 0; s < product.count; ++s, ++segments) {
      const auto& [a, b] = product.segments[s];
      params.a[segments] = tensor_map(a, Shape::kM, Shape::kK, Swizzle::k128);
      params.b[segments] =
          tensor_map(b, Shape::template kBoxRows<kMajorB> / cluster, Shape::kK, Swizzle::k128);
      params.depth[segments] = a.columns;
    }
    params.ends[i] = segments;
    params.first[i] = params.columns;
    params.columns += static_cast<int>(column_tiles<Shape>(product.N));
    params.bias[i] = product.bias;
    const Matrix<T> out{product.out, product.M, product.N, product.N};
    using Boxes = StoreBoxes<Shape::kN>;
    params.out[i] = tensor_map(out, Boxes::kRows, Boxes::kWidth, Swizzle::k128);
    params.N[i] = product.N;
  }
  for (int i = products.count; i < Params::kProducts; ++i) {
    params.first[i] = std::numeric_limits<int>::max();
  }
  params.masked = products.data->masked;
  params.dropout = products.data->dropout, params.kept = products.data->kept;
  params.M = products.data->M;
  params.report = arch::wait_report(arch::WaitingKernel::kProduct);
  return params;
}

// By clusters of so many blocks, as many as there are multiprocessors.
template <class T, class Shape, Major kMajorB>
void launch_product_tiles(const Products<T>& products, int cluster, int multiprocessors,
                          Stream stream) {
  const auto launch = [&]<class Params>(void (*kernel)(Params)) {
    const auto params = product_params<Params, Shape, kMajorB>(products, cluster);
    const int64_t tiles = TileWalk<Shape>::tiles(params.M, params.columns, cluster);
    const int64_t clusters = std::min<int64_t>(tiles, multiprocessors / cluster);
    arch::launch_dependent(kernel, dim3(static_cast<unsigned>(clusters * cluster)), Shape::kThreads,
                           Shape::kSharedBytes, stream, params, static_cast<unsigned>(cluster));
  };
  if (products.count == 1 && products.data->count <= kLayerSegments) {
    launch(product_sm90_kernel<T, Shape, kMajorB>);
  } else {
    launch(products_sm90_kernel<T, Shape, kMajorB>);
  }
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

// The cheapest for results [M, widths[i]]; among equals the widest, and alone.
inline ProductTiles choose_tiles(int64_t M, std::span<const int64_t> widths,
                                 int64_t multiprocessors, int most_cluster) {
  // In a cycle the tensor cores of a multiprocessor multiply and add so often, and L2 brings some
  // 46 bytes to it while all of them read (fast.cu's kernel without clusters needs as many).
  constexpr int64_t kMultiplyAdds = 2048, kBytes = 46;
  ProductTiles best{};
  const auto consider = [&]<class Shape>(Shape) {
    int64_t columns = 0;
    for (const int64_t N : widths) columns += column_tiles<Shape>(N);
    for (int cluster = 1; cluster <= most_cluster; ++cluster) {
      const int64_t tiles = TileWalk<Shape>::tiles(M, columns, cluster);
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
void launch_products_of_layout(const Products<T>& products, Stream stream) {
  const int multiprocessors = arch::multiprocessors();
  int64_t widths[kMostTogether];
  for (int i = 0; i < products.count; ++i) widths[i] = products.data[i].N;
  const auto [columns, cluster, cycles] =
      choose_tiles(products.data->M, std::span(widths).first(static_cast<size_t>(products.count)),
                   multiprocessors, most_cluster());
  const auto launch = columns == WideProduct::kN ? launch_product_tiles<T, WideProduct, kMajorB>
                      : columns == MiddleProduct::kN
                          ? launch_product_tiles<T, MiddleProduct, kMajorB>
                          : launch_product_tiles<T, NarrowProduct, kMajorB>;
  launch(products, cluster, multiprocessors, stream);
}

// In one launch.
template <class T>
void launch_products(const Products<T>& products, BLayout layout, Stream stream) {
  if (layout == BLayout::kColumns) {
    launch_products_of_layout<T, Major::kK>(products, stream);
  } else {
    launch_products_of_layout<T, Major::kMN>(products, stream);
  }
}

}  // namespace lora_ext::sm90
