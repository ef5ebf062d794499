// Instructions of sm_90 and sm_90a, one function each. A build for several architectures compiles
// kernels for all of them: a kernel that calls these has a body only where LORA_EXT_SM90A is
// defined.
#pragma once

#include <cuda.h>

#include "../element.h"
#include "any_gpu.h"
#include "descriptor_sm90.h"
#include "ptx_sm90_wgmma.h"
#include "wait_report.h"

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define LORA_EXT_SM90A 1
#endif

namespace lora_ext::arch {

// ---- Kernels that overlap: arch::launch_dependent ----------------------------------------------

// A kernel launched so may begin while the one before still runs. Every thread of it waits here,
// before it reads or writes global memory, until that one is over and what it wrote can be seen.
// Without effect before sm_90, where kernels do not overlap.
LORA_EXT_DEVICE void wait_for_previous_kernel() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;\n" ::: "memory");
#endif
}

// The next kernel of the stream may begin once every block has said so, or ended.
LORA_EXT_DEVICE void let_next_kernel_start() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;\n" ::: "memory");
#endif
}

// ---- mbarrier: 8 bytes of shared memory that count arrivals of threads and bytes of TMA ---------
//
// A barrier of threads cannot wait for a copy that no thread makes; and who arrives here need not
// wait, so that loading and multiplying go on at their own pace.

LORA_EXT_DEVICE void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals)
               : "memory");
}

// After mbarrier_init and before TMA is told of the barrier, which it does not see otherwise.
LORA_EXT_DEVICE void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
}

LORA_EXT_DEVICE void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// Arrives; the phase is not complete before TMA has delivered so many bytes more.
LORA_EXT_DEVICE void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes)
               : "memory");
}

// Whether the phase of this parity is complete; waits for it a while.
LORA_EXT_DEVICE bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t complete;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}\n"
      : "=r"(complete)
      : "r"(barrier), "r"(parity)
      : "memory");
  return complete != 0;
}

LORA_EXT_DEVICE void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  while (!mbarrier_try_wait(barrier, parity)) {
  }
}

// A wait without end becomes an error of CUDA's, seconds to minutes later, instead of a process
// that hangs; `report` (launch.h) tells the host which one it was, for which tile (-1: after the
// last). For the thread that loads:
// threads that multiply have no register to count with, and where they wait without end, it does
// too.
LORA_EXT_DEVICE void mbarrier_wait_bounded(uint32_t barrier, uint32_t parity, WaitReport* report,
                                           int row, int column) {
  constexpr uint32_t kMostTurns = 1u << 26;
  for (uint32_t turn = 0; !mbarrier_try_wait(barrier, parity); ++turn) {
    if (turn < kMostTurns) continue;
    report->fill(barrier, parity, row, column);
    __trap();
    __builtin_unreachable();
  }
}

// ---- Clusters: blocks that run at the same time, on neighbouring multiprocessors ---------------
//
// They reach each other's shared memory, and TMA brings to all of them what it reads once. A block
// must not end while another one may still reach for its shared memory.

LORA_EXT_DEVICE int cluster_size() {
  int size;
  asm("mov.u32 %0, %%cluster_nctaid.x;\n" : "=r"(size));
  return size;
}
LORA_EXT_DEVICE int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctaid.x;\n" : "=r"(rank));
  return rank;
}

// The barrier of all threads of a cluster, after which they see that mbarriers were initialised
// before fence_mbarrier_init; it orders nothing else.
LORA_EXT_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.relaxed.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// The same, after which they also see what all of them had stored to shared memory.
LORA_EXT_DEVICE void cluster_sync_stores() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;\n" ::
          : "memory");
}

// This address of shared memory in the block of that rank.
LORA_EXT_DEVICE uint32_t cluster_address(uint32_t shared, int rank) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(address) : "r"(shared), "r"(rank));
  return address;
}

// mbarrier_arrive at a cluster_address.
LORA_EXT_DEVICE void mbarrier_arrive_at(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// The same, and what this thread stored to shared memory, or saw there, comes before: for who waits
// with mbarrier_wait_cluster.
LORA_EXT_DEVICE void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(barrier)
               : "memory");
}

// mbarrier_wait for what threads of any block of the cluster did before they arrived.
LORA_EXT_DEVICE void mbarrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  uint32_t complete = 0;
  while (complete == 0) {
    asm volatile(
        "{\n"
        ".reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n"
        "}\n"
        : "=r"(complete)
        : "r"(barrier), "r"(parity)
        : "memory");
  }
}

// At a cluster_address.
LORA_EXT_DEVICE float cluster_load_float(uint32_t address) {
  float value;
  asm volatile("ld.shared::cluster.f32 %0, [%1];\n" : "=f"(value) : "r"(address) : "memory");
  return value;
}

// 16 bytes there.
LORA_EXT_DEVICE Words cluster_load_16(uint32_t address) {
  Words words;
  asm volatile("ld.shared::cluster.v4.b32 {%0,%1,%2,%3}, [%4];\n"
               : "=r"(words.word[0]), "=r"(words.word[1]), "=r"(words.word[2]), "=r"(words.word[3])
               : "r"(address)
               : "memory");
  return words;
}

// ---- Barriers 1 to 15 of a block, for some of its warps; 0 is that of __syncthreads ------------
//
// The warps that load never come to those of the warps that multiply.

LORA_EXT_DEVICE void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// Does not wait for the others.
LORA_EXT_DEVICE void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;\n" ::"r"(number), "r"(threads) : "memory");
}

// ---- Registers of the threads of a warpgroup ---------------------------------------------------
//
// A kernel starts with as many for every thread. The sums of a tile need more than that, a thread
// that loads next to none: it gives up what the others take.

template <int kRegisters>
LORA_EXT_DEVICE void register_increase() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}
template <int kRegisters>
LORA_EXT_DEVICE void register_decrease() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kRegisters));
}

// ---- Sums to shared memory ---------------------------------------------------------------------

// Four 8x8 matrices of 16-bit elements, as ldmatrix_x4 reads them: lane l gives the address of row
// l % 8 of matrix l / 8, and of each matrix the elements (l / 4, 2 * (l % 4)) and its right
// neighbour, which is how the sums of wgmma lie.
LORA_EXT_DEVICE void stmatrix_x4(uint32_t shared, const uint32_t (&in)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};\n" ::"r"(shared),
               "r"(in[0]), "r"(in[1]), "r"(in[2]), "r"(in[3])
               : "memory");
}

// ---- TMA ---------------------------------------------------------------------------------------

using TensorMap = CUtensorMap;

// TMA and wgmma see what this thread stored to shared memory, or saw that others did.
LORA_EXT_DEVICE void fence_proxy_async() {
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
}

// Into the cache of descriptors, or the first copy waits for it.
LORA_EXT_DEVICE void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}

// One thread starts to copy the box at (row, column), zero outside of the matrix, and the barrier
// counts its bytes, of the whole box. No thread makes addresses, and wgmma reads the box as it
// lies. `shared` is a multiple of 128, of 1024 for Swizzle::k128.
LORA_EXT_DEVICE void tma_load_2d(uint32_t shared, const TensorMap& map, uint32_t barrier,
                                 int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4}], [%2];\n" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row)
      : "memory");
}

// The same to each block of the cluster that has its bit in `blocks`: at the same address in it,
// and counted by its barrier at the same address.
LORA_EXT_DEVICE void tma_load_2d_multicast(uint32_t shared, const TensorMap& map, uint32_t barrier,
                                           int column, int row, uint32_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%3, %4}], [%2], %5;\n" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// One thread starts to copy the box at `shared`, as tma_load_2d puts it there, to (row, column);
// what is outside of the matrix is left out. A thread needs a register for each address that it
// stores to, and its tensor cores wait meanwhile.
LORA_EXT_DEVICE void tma_store_2d(const TensorMap& map, uint32_t shared, int column, int row) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];\n" ::"l"(&map),
      "r"(shared), "r"(column), "r"(row)
      : "memory");
}

// What this thread has stored since the last commit becomes a group.
LORA_EXT_DEVICE void tma_store_commit() {
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
}

// Waits until TMA has read the shared memory of all but kGroups groups of this thread: it may be
// written again. A block may end only after that.
template <int kGroups>
LORA_EXT_DEVICE void tma_store_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(kGroups) : "memory");
}

// The driver's function, asked for so that nothing has to be linked with it; null if it has none.
inline auto tensor_map_encoder() {
  constexpr unsigned kCudaVersion = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found;
  const cudaError_t error = cudaGetDriverEntryPointByVersion(
      "cuTensorMapEncodeTiled", &function, kCudaVersion, cudaEnableDefault, &found);
  if (error != cudaSuccess) cudaGetLastError();  // or the next kernel is told of it
  const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
  return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(there ? function : nullptr);
}

// Describes a matrix, rows of `columns` elements `stride` apart, and the box that one instruction
// copies. Returns CUDA_SUCCESS or why not. On the host.
template <class T>
inline int encode_tensor_map(TensorMap& map, const T* data, int64_t rows, int64_t columns,
                             int64_t stride, int box_rows, int box_columns, Swizzle swizzle) {
  static_assert(sizeof(T) == 2);
  static const auto encode = tensor_map_encoder();
  if (encode == nullptr) return CUDA_ERROR_NOT_SUPPORTED;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride) * sizeof(T)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns),
                             static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[2] = {1, 1};
  const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                         CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_32B};
  return encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 2, const_cast<T*>(data), sizes, strides, box,
                steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[static_cast<int>(swizzle)],
                CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
}

}  // namespace lora_ext::arch
