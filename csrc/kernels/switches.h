// What the kernels do that few GPUs, or none, have run: LORA_EXT_CUDA_OFF switches it off, a list
// of names with commas between. Host code.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace lora_ext {

enum class Mechanism {
  kCluster,    // blocks on sm_90 that share what they read, and add what they have summed
  kSelfCheck,  // of the kernels at their first use on a GPU (self_check.h)
  kTogether,   // layers of one x (lora_linear_multi_run.h)
};

inline std::string_view name_of(Mechanism mechanism) {
  switch (mechanism) {
    case Mechanism::kCluster:
      return "cluster";
    case Mechanism::kSelfCheck:
      return "self_check";
    default:
      return "together";
  }
}
constexpr Mechanism kMechanisms[] = {Mechanism::kCluster, Mechanism::kSelfCheck,
                                     Mechanism::kTogether};

// Throws std::runtime_error if a name in it is no mechanism's. The environment is read each time.
inline bool switched_off(Mechanism mechanism) {
  const char* value = std::getenv("LORA_EXT_CUDA_OFF");
  std::string_view left = value == nullptr ? "" : value;
  bool off = false;
  while (!left.empty()) {
    std::string_view name = left.substr(0, left.find(','));
    left.remove_prefix(std::min(name.size() + 1, left.size()));
    while (name.starts_with(' ')) name.remove_prefix(1);
    while (name.ends_with(' ')) name.remove_suffix(1);
    bool known = name.empty();
    std::string names;
    for (const Mechanism one : kMechanisms) {
      known |= name == name_of(one);
      off |= one == mechanism && name == name_of(one);
      names += (names.empty() ? "'" : ", '") + std::string(name_of(one)) + "'";
    }
    if (!known) {
      throw std::runtime_error("lora_ext: LORA_EXT_CUDA_OFF: got '" + std::string(name) +
                               "', expected of " + names + ", with commas between; or unset it");
    }
  }
  return off;
}

}  // namespace lora_ext
