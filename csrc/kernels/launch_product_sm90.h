// The product of the sm_90a family: its tensor maps, tiles and grids. Host code without torch.
#pragma once

#include <algorithm>
#include <iterator>

#include "product_sm90.h"
#include "tensor_map_sm90.h"

namespace lora_ext::sm90 {

template <class T, class Shape, Major kMajorB>
void launch_product_tiles(const Product<T>& product, int multiprocessors, Stream stream) {
  ProductParams<T> params{};
  for (int s = 0; s < product.count; ++s) {
    const auto& [a, b] = product.segments[s];
    params.a[s] = tensor_map(a, Shape::kM, Shape::kK, Swizzle::k128);
    params.b[s] =
        tensor_map(b, kMajorB == Major::kK ? Shape::kN : Shape::kK, Shape::kK, Swizzle::k128);
    params.depth[s] = a.columns;
  }
  params.count = product.count, params.masked = product.masked;
  params.dropout = product.dropout;
  params.bias = product.bias;
  const Matrix<T> out{product.out, product.M, product.N, product.N};
  using Boxes = StoreBoxes<Shape::kN>;
  params.out = tensor_map(out, Boxes::kRows, Boxes::kWidth, Swizzle::k128);
  params.M = product.M, params.N = product.N;
  const int64_t tiles = TileWalk<Shape>::tiles(product.M, product.N);
  const auto blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  arch::launch_dependent(product_sm90_kernel<T, Shape, kMajorB>, dim3(blocks), Shape::kThreads,
                         Shape::kSharedBytes, stream, params);
}

using WideProduct = ProductShape<256, 4>;
using MiddleProduct = ProductShape<128, 6>;
using NarrowProduct = ProductShape<64, 8>;

// A width of the tiles, and what it costs: bytes that the busiest block brings to shared memory.
struct ProductTiles {
  int columns;
  int64_t bytes;
};

// The cheapest; among equals the widest.
inline ProductTiles choose_tiles(int64_t M, int64_t N, int64_t multiprocessors) {
  const auto cost = [&]<class Shape>(Shape) -> ProductTiles {
    const int64_t tiles = TileWalk<Shape>::tiles(M, N);
    return {Shape::kN, (tiles + multiprocessors - 1) / multiprocessors * Shape::kStageBytes};
  };
  const ProductTiles candidates[] = {cost(WideProduct{}), cost(MiddleProduct{}),
                                     cost(NarrowProduct{})};
  return *std::min_element(
      std::begin(candidates), std::end(candidates),
      [](const ProductTiles& a, const ProductTiles& b) { return a.bytes < b.bytes; });
}

template <class T, Major kMajorB>
void launch_product_of_layout(const Product<T>& product, Stream stream) {
  const int blocks = arch::multiprocessors();
  switch (choose_tiles(product.M, product.N, blocks).columns) {
    case WideProduct::kN:
      return launch_product_tiles<T, WideProduct, kMajorB>(product, blocks, stream);
    case MiddleProduct::kN:
      return launch_product_tiles<T, MiddleProduct, kMajorB>(product, blocks, stream);
    default:
      return launch_product_tiles<T, NarrowProduct, kMajorB>(product, blocks, stream);
  }
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
