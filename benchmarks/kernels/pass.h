// What is checked and timed.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "reference.h"

namespace gpu_bench {

struct Pass {
  std::string name;
  std::string baseline;  // the pass that its time is compared with
  double flops, bytes;   // bytes: each operand once, each result once
  std::function<void()> run;
  std::function<std::vector<Error>()> errors;  // of what the last run made
};

}  // namespace gpu_bench
