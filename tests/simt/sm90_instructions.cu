// Every instruction of csrc/kernels/arch/ptx_sm90.h once, for the assembler.

#include "sm90_kernels.h"

namespace simt_test {

template __global__ void product_kernel<Bf16, 16, Major::kK, Mistake::kNone>(
    const __grid_constant__ ProductParams<Bf16>);
template __global__ void product_kernel<Bf16, 32, Major::kK, Mistake::kNone>(
    const __grid_constant__ ProductParams<Bf16>);
template __global__ void product_kernel<Bf16, 64, Major::kMN, Mistake::kNone>(
    const __grid_constant__ ProductParams<Bf16>);
template __global__ void product_kernel<Fp16, 128, Major::kMN, Mistake::kNone>(
    const __grid_constant__ ProductParams<Fp16>);
template __global__ void product_kernel<Bf16, 192, Major::kMN, Mistake::kNone>(
    const __grid_constant__ ProductParams<Bf16>);
template __global__ void product_kernel<Fp16, 256, Major::kK, Mistake::kNone>(
    const __grid_constant__ ProductParams<Fp16>);

// A in registers, and what the product does not use.
template <class T, int kN>
__global__ void __launch_bounds__(128, 1)
    registers_kernel(const __grid_constant__ arch::TensorMap map, const uint32_t* a, float* out) {
#if defined(LORA_EXT_SM90A)
  LORA_EXT_DYNAMIC_SHARED(shared);
  const uint64_t b = arch::wgmma_descriptor(arch::shared_address(shared), 0, 1024, Swizzle::k128);
  uint32_t registers[4];
  float sums[kN / 2];
#pragma unroll
  for (int i = 0; i < 4; ++i) registers[i] = a[threadIdx.x * 4 + i];
  arch::tma_prefetch(map);
  arch::wait_for_previous_kernel();
  arch::let_next_kernel_start();
  arch::fence_proxy_async();
  arch::wgmma_fence();
  arch::wgmma<T, kN>(sums, registers, b, false);
  arch::wgmma<T, kN, Major::kMN>(sums, registers, b, true);
  arch::wgmma_commit();
  arch::wgmma_wait<0>();
#pragma unroll
  for (int i = 0; i < kN / 2; ++i) out[threadIdx.x * kN / 2 + i] = sums[i];
  arch::barrier_arrive(2, 128);
  arch::stmatrix_x4(arch::shared_address(shared), registers);
  arch::tma_store_2d(map, arch::shared_address(shared), 0, 0);
  arch::tma_store_commit();
  arch::tma_store_wait_read<1>();
  arch::cluster_sync();
  const uint32_t own = arch::shared_address(shared);
  arch::tma_load_2d_multicast(own, map, own + 64, 0, 0, (1u << arch::cluster_size()) - 1);
  arch::mbarrier_arrive_at(arch::cluster_address(own + 64, 1 - arch::cluster_rank()));
  arch::mbarrier_arrive_cluster(arch::cluster_address(own + 64, 0));
  arch::mbarrier_wait_cluster(own + 64, 1);
  const arch::Words words = arch::cluster_load_16(arch::cluster_address(own, 0));
  out[0] += bits_to_float(words.word[0] ^ words.word[1] ^ words.word[2] ^ words.word[3]);
  arch::cluster_sync_stores();
  out[1] += arch::cluster_load_float(arch::cluster_address(own, 1));
  arch::mbarrier_wait_bounded(own + 64, 0, reinterpret_cast<arch::WaitReport*>(out), 0, 0);
#endif
}

template __global__ void registers_kernel<Bf16, 16>(const __grid_constant__ arch::TensorMap,
                                                    const uint32_t*, float*);
template __global__ void registers_kernel<Fp16, 32>(const __grid_constant__ arch::TensorMap,
                                                    const uint32_t*, float*);
template __global__ void registers_kernel<Bf16, 64>(const __grid_constant__ arch::TensorMap,
                                                    const uint32_t*, float*);
template __global__ void registers_kernel<Fp16, 128>(const __grid_constant__ arch::TensorMap,
                                                     const uint32_t*, float*);
template __global__ void registers_kernel<Bf16, 192>(const __grid_constant__ arch::TensorMap,
                                                     const uint32_t*, float*);
template __global__ void registers_kernel<Fp16, 256>(const __grid_constant__ arch::TensorMap,
                                                     const uint32_t*, float*);

int encode(arch::TensorMap& map, const Bf16* data) {
  return arch::encode_tensor_map(map, data, 64, 64, 64, 64, 64, Swizzle::k128);
}

}  // namespace simt_test
