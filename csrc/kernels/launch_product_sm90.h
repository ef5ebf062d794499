// The product of the sm_90a family: its tensor maps, tiles and grids. Host code without torch.
#pragma once

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
  params.threshold = product.threshold, params.rng_state = product.rng_state;
  params.bias = product.bias, params.out = product.out;
  params.M = product.M, params.N = product.N;
  const int64_t tiles = row_tiles<Shape>(product.M) * column_tiles<Shape>(product.N);
  const auto blocks = static_cast<unsigned>(tiles < multiprocessors ? tiles : multiprocessors);
  arch::launch_dependent(product_sm90_kernel<T, Shape, kMajorB>, dim3(blocks), Shape::kThreads,
                         Shape::kSharedBytes, stream, params);
}

// The widest tile, unless with another one the busiest block has less to bring to shared memory.
template <class T, Major kMajorB>
void launch_product_of_layout(const Product<T>& product, Stream stream) {
  using Wide = ProductShape<256, 4>;
  using Middle = ProductShape<128, 6>;
  using Narrow = ProductShape<64, 8>;
  const int blocks = arch::multiprocessors();
  const auto bytes = [&]<class Shape>(Shape) {
    const int64_t tiles = row_tiles<Shape>(product.M) * column_tiles<Shape>(product.N);
    return (tiles + blocks - 1) / blocks * Shape::kStageBytes;
  };
  const int64_t wide = bytes(Wide{}), middle = bytes(Middle{}), narrow = bytes(Narrow{});
  if (wide <= middle && wide <= narrow) {
    launch_product_tiles<T, Wide, kMajorB>(product, blocks, stream);
  } else if (middle <= narrow) {
    launch_product_tiles<T, Middle, kMajorB>(product, blocks, stream);
  } else {
    launch_product_tiles<T, Narrow, kMajorB>(product, blocks, stream);
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
