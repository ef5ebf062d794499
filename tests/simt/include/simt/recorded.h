// What launches asked for: of which kernel, how many blocks of how many threads, and how much
// shared memory. It is known where no kernel runs, too (`limits_only`).
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "simt/thread.h"

namespace simt {

struct RecordedLaunch {
  const void* kernel;
  dim3 grid, block, cluster;  // cluster: 1 where a launch names none
  size_t shared_bytes;
  bool dependent;  // may begin before the kernel launched last is over
};

// Of every launch that was allowed, until the vector is cleared.
inline std::vector<RecordedLaunch>& recorded() {
  static std::vector<RecordedLaunch> instance;
  return instance;
}

// As the source writes it, "void lora_ext::merge_kernel<...>(...)". A program that is no shared
// library has to be linked with -rdynamic for it.
inline std::string kernel_name(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) {
    return "unknown";
  }
  int status = 0;
  char* const name = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  const std::string text = status == 0 ? name : info.dli_sname;
  std::free(name);
  return text;
}

}  // namespace simt
