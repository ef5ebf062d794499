#include "ops/print_path.h"

#include <cstdlib>
#include <iostream>
#include <mutex>
#include <set>
#include <sstream>
#include <string_view>

namespace lora_ext {

bool prints_paths() {
  static const bool asked = [] {
    const char* value = std::getenv("LORA_EXT_PRINT_PATHS");
    return value != nullptr && *value != '\0' && std::string_view(value) != "0";
  }();
  return asked;
}

void print_path(const PathOfCall& call, const std::string& path, const std::string& reason) {
  std::ostringstream line;
  line << "lora_ext: " << call.pass << " of " << call.M << " rows, " << call.K << " -> " << call.N
       << ", r " << call.r << ", " << call.base;
  if (call.adapter != call.base) line << " with " << call.adapter << " adapters";
  if (call.dropout) line << ", dropout";
  line << ": " << path << ": " << reason << '\n';
  static std::mutex mutex;
  static std::set<std::string> printed;
  const std::lock_guard lock(mutex);
  if (printed.insert(line.str()).second) std::cerr << line.str() << std::flush;
}

}  // namespace lora_ext
