// The product of the sm_80 family: its tiles and grids. Host code without torch.
#pragma once

#include "elementwise.h"
#include "product_sm80.h"

namespace lora_ext::sm80 {

template <class T, BLayout kLayout>
void launch_product_of_layout(const Product<T>& params, Stream stream) {
  const auto run = [&](auto shape) {
    using Shape = decltype(shape);
    const dim3 grid(static_cast<unsigned>(TileWalk<Shape>::tiles(params.M, params.N)));
    static_assert(Shape::kSharedBytes <= kLeastSharedBytes);
    arch::launch(product_sm80_kernel<T, Shape, kLayout>, grid, Shape::kThreads, Shape::kSharedBytes,
                 stream, params);
  };
  const int64_t large_tiles = ceil_div(params.M, 128) * ceil_div(params.N, 128);
  if (large_tiles >= wanted_blocks() / 2) {
    run(ProductShape<128, 128, 64, 32, 3>{});
  } else {
    run(ProductShape<64, 64, 32, 32, 4>{});
  }
}

// A launch for each.
template <class T>
void launch_products(const Products<T>& call, BLayout layout, Stream stream) {
  for (int i = 0; i < call.count; ++i) {
    if (layout == BLayout::kColumns) {
      launch_product_of_layout<T, BLayout::kColumns>(call.data[i], stream);
    } else {
      launch_product_of_layout<T, BLayout::kRows>(call.data[i], stream);
    }
  }
}

}  // namespace lora_ext::sm80
