// Which layers of a call of lora_linear_multi run together on CUDA, from facts alone.
#pragma once

#include <span>
#include <vector>

#include "cuda/lora_linear_path.h"
#include "kernels/lora_linear_multi.h"
#include "kernels/switches.h"

namespace lora_ext {

struct CudaMultiLayer {
  CudaCall call;  // its own; without adapter as if it had one of rank 1
  bool adapted;
  CudaPath path;       // of that call
  bool makes_h;        // in backward: h is needed and was not kept
  bool wants_nothing;  // in backward: neither dx nor a gradient of an adapter
};

// Why a layer has a call of its own whatever the others are; null where it may run with them.
inline const char* why_alone(const CudaMultiLayer& layer) {
  const CudaCall& call = layer.call;
  const bool mixed = layer.adapted && call.adapter != call.base;
  if (layer.wants_nothing) return "no gradient is wanted that kernels make";
  if (layer.path.kernels != CudaPath::Kernels::Fused) return layer.path.reason;
  if (!call.backward && !call.transposed && call.aligned_A &&
      few_rows_fit(call.M, call.N, call.r, mixed, call.dropout,
                   few_rows_family(layer.path.family))) {
    return "few rows without dropout: one kernel makes h and y of each layer";
  }
  if (call.backward && call.dropout) {
    return "with dropout each layer drops of dx by a mask of its own, which one sum cannot do";
  }
  if (call.dropout && layer.path.family == KernelFamily::Sm80) {
    return "with dropout each layer has a pass over x of its own, and on sm_80 a product";
  }
  if (layer.makes_h) return "h was not kept for backward";
  return nullptr;
}

// Of each layer: why it has a call of its own, or null. Those that have none run together; there
// are none or at least two of them, and no more than kMostTogether.
struct CudaMultiChoice {
  std::vector<const char*> alone;
  int together = 0;
  size_t first = 0;  // of those together, the first with an adapter
};

// With the first layer that has an adapter and may run with others run those whose kernels, weight
// and adapters are of the same kind.
inline CudaMultiChoice choose_cuda_multi(std::span<const CudaMultiLayer> layers) {
  CudaMultiChoice choice;
  if (switched_off(Mechanism::kTogether)) {
    choice.alone.assign(layers.size(), "LORA_EXT_CUDA_OFF=together");
    return choice;
  }
  const CudaMultiLayer* first = nullptr;
  for (size_t i = 0; i < layers.size(); ++i) {
    choice.alone.push_back(why_alone(layers[i]));
    if (choice.alone[i] == nullptr && layers[i].adapted && first == nullptr) {
      first = &layers[i], choice.first = i;
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const CudaMultiLayer& layer = layers[i];
    const char*& why = choice.alone[i];
    if (why != nullptr) continue;
    if (first == nullptr) {
      why = "no layer has an adapter";
    } else if (layer.path.family != first->path.family) {
      why = "the first layer's kernels are of another family";
    } else if (layer.call.transposed != first->call.transposed) {
      why = "its weight lies otherwise than the first layer's";
    } else if (layer.adapted && layer.call.adapter != first->call.adapter) {
      why = "its adapter is of another type than the first layer's";
    } else if (choice.together == kMostTogether) {
      why = "four layers run together";
    } else {
      ++choice.together;
    }
  }
  if (choice.together == 1) {
    choice.together = 0;
    choice.alone[choice.first] = "no other layer can run together with it";
  }
  return choice;
}

}  // namespace lora_ext
