#include "cuda/trust.h"

#include <ATen/ATen.h>
#include <ATen/cuda/CUDAContext.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/util/Exception.h>

#include <array>
#include <atomic>
#include <mutex>
#include <stdexcept>
#include <string>

#include "cuda/lora_linear.h"
#include "cuda/operands.h"
#include "cuda/trust_file.h"
#include "kernels/self_check.h"
#include "kernels/switches.h"

namespace lora_ext {
namespace {

enum class Trust { Unknown, Trusted, Wrong };

struct Entry {
  std::atomic<Trust> trust = Trust::Unknown;
  std::mutex mutex;  // of the check
};

// With clusters and without them: what is found of the one says nothing about the other.
Entry& entry_of(KernelFamily family, int device) {
  constexpr int kMostDevices = 64;
  static std::array<std::array<std::array<Entry, kMostDevices>, 2>, 2> entries;
  TORCH_CHECK(device >= 0 && device < kMostDevices, "lora_ext: no GPU ", device);
  const size_t clusters = switched_off(Mechanism::kCluster) ? 0 : 1;
  return entries[clusters][static_cast<size_t>(family)][static_cast<size_t>(device)];
}

const char* name_of(KernelFamily family) {
  return family == KernelFamily::Sm90 ? "sm_90a" : "sm_80";
}

// All that an answer depends on; empty where something of it is not known.
std::string fact_of(KernelFamily family) {
  const std::string build = TrustFile::build();
  int driver = 0;
  if (build.empty() || cudaDriverGetVersion(&driver) != cudaSuccess) return "";
  const auto* device = at::cuda::getCurrentDeviceProperties();
  return c10::str(name_of(family), ", ", device->name, ", sm_", device->major, device->minor,
                  ", driver ", driver, ", CUDA ", CUDART_VERSION, ", clusters ",
                  switched_off(Mechanism::kCluster) ? "off" : "on", ", ", build);
}

// What is wrong, or empty.
std::string check(KernelFamily family) {
  CudaScratch scratch(at::TensorOptions().device(at::kCUDA));
  const auto stream = at::cuda::getCurrentCUDAStream();
  const auto copy = [&](void* to, const void* from, int64_t bytes) {
    const auto count = static_cast<size_t>(bytes);
    C10_CUDA_CHECK(cudaMemcpyAsync(to, from, count, cudaMemcpyDefault, stream));
    C10_CUDA_CHECK(cudaStreamSynchronize(stream));
  };
  try {
    for (const SelfCheckSize size : kSelfCheckSizes) {
      std::string wrong = SelfCheck(size, scratch.allocator(), copy).run(family, stream);
      if (!wrong.empty()) return wrong;
    }
  } catch (const std::exception& error) {
    return error.what();
  }
  return "";
}

// The same, unless a process before has found nothing.
std::string check_once(KernelFamily family) {
  const TrustFile file(TrustFile::default_place());
  const std::string fact = fact_of(family);
  if (!fact.empty() && file.has(fact)) return "";
  std::string wrong = check(family);
  if (wrong.empty() && !fact.empty()) file.add(fact);
  return wrong;
}

void warn(KernelFamily family, const std::string& wrong) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  TORCH_WARN("lora_ext: the kernels for ", name_of(family),
             " are not used on this GPU, cuBLAS's products are: ", wrong,
             ". Please report this sentence with the output of `lora-ext info` (", device->name,
             ", sm_", device->major, device->minor, ", CUDA ", CUDART_VERSION,
             "). LORA_EXT_CUDA_OFF=self_check uses them unchecked");
}

}  // namespace

bool is_trusted(KernelFamily family) {
  Entry& entry = entry_of(family, c10::cuda::current_device());
  if (entry.trust == Trust::Unknown) {
    if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
      return true;
    }
    const std::lock_guard lock(entry.mutex);
    // Not for good: whoever switches it on later gets the check.
    if (entry.trust == Trust::Unknown && switched_off(Mechanism::kSelfCheck)) return true;
    if (entry.trust == Trust::Unknown) {
      const std::string wrong = check_once(family);
      entry.trust = wrong.empty() ? Trust::Trusted : Trust::Wrong;
      if (!wrong.empty()) warn(family, wrong);
    }
  }
  return entry.trust == Trust::Trusted;
}

CudaPath trusted_path(const CudaCall& call) {
  const auto* device = at::cuda::getCurrentDeviceProperties();
  const int capability = device->major * 10 + device->minor;
  const CudaPath path = cuda_path(call, capability);
  if (path.kernels == CudaPath::Kernels::Composed || is_trusted(path.family)) return path;
  return cuda_path(call, capability);  // which knows what was found
}

bool found_wrong(KernelFamily family, int device) {
  return device >= 0 && entry_of(family, device).trust == Trust::Wrong;
}

}  // namespace lora_ext
