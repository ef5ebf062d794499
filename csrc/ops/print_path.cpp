#include "ops/print_path.h"

#include <cstdlib>
#include <iostream>
#include <mutex>
#include <set>
#include <sstream>
#include <string_view>

#include "ops/tensors.h"

namespace lora_ext {

bool prints_paths() {
  static const bool asked = [] {
    const char* value = std::getenv("LORA_EXT_PRINT_PATHS");
    return value != nullptr && *value != '\0' && std::string_view(value) != "0";
  }();
  return asked;
}

void print_path(const std::string& call, const std::string& path, const std::string& reason) {
  const std::string line = "lora_ext: " + call + ": " + path + ": " + reason + '\n';
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(line).second) std::cerr << line << std::flush;
}

void print_path(const PathOfCall& call, const std::string& path, const std::string& reason) {
  std::ostringstream text;
  text << call.pass << " of " << call.M << (call.M == 1 ? " row, " : " rows, ") << call.K << " -> "
       << call.N << ", r " << call.r << ", " << dtype_name(call.base);
  if (call.adapter != call.base) text << " with " << dtype_name(call.adapter) << " adapters";
  if (call.dropout) text << ", dropout";
  print_path(text.str(), path, reason);
}

}  // namespace lora_ext
