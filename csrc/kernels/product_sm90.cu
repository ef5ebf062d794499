// The product of the sm_90a family, compiled once for each type of the base (LORA_EXT_BASE).
#include "launch_product_sm90.h"

namespace lora_ext::sm90 {

using Base = LORA_EXT_BASE;
template void launch_products(const Products<Base>&, BLayout, Stream);

}  // namespace lora_ext::sm90
