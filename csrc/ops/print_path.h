// LORA_EXT_PRINT_PATHS=1: which code an operator runs is printed once for each kind of call, to
// stderr. `explain` tells of layers before they run, this of what ran.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <string>

namespace lora_ext {

// Whether it was asked for; read once.
bool prints_paths();

// Nothing where such a call was printed before.
void print_path(const std::string& call, const std::string& path, const std::string& reason);

// A call of lora_linear.
struct PathOfCall {
  const char* pass;  // "forward" or "backward"
  int64_t M, N, K, r;
  at::ScalarType base, adapter;
  bool dropout;
};

void print_path(const PathOfCall& call, const std::string& path, const std::string& reason);

}  // namespace lora_ext
