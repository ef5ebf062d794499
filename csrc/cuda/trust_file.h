// Which kernels were found right on which GPU, by any process before: a file in the folder of
// `autotune`'s, a line for each. Host code without torch and CUDA.
#pragma once

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

namespace lora_ext {

class TrustFile {
 public:
  explicit TrustFile(std::filesystem::path place) : place_(std::move(place)) {}

  // $LORA_EXT_CACHE, $XDG_CACHE_HOME/lora_ext or ~/.cache/lora_ext, as in lora_ext/tuning.py; empty
  // where there is no home.
  static std::filesystem::path default_place() {
    const auto folder = [](const char* variable, const char* inside) -> std::filesystem::path {
      const char* value = std::getenv(variable);
      if (value == nullptr || *value == '\0') return {};
      return std::filesystem::path(value) / inside;
    };
    for (const auto& found : {folder("LORA_EXT_CACHE", ""), folder("XDG_CACHE_HOME", "lora_ext"),
                              folder("HOME", ".cache/lora_ext")}) {
      if (!found.empty()) return found / "trusted-kernels.txt";
    }
    return {};
  }

  // What tells this build from others: a check of other kernels says nothing about these. Empty if
  // it is not known.
  static std::string build() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<const void*>(&default_place), &info) == 0) return "";
    std::error_code error;
    const auto size = std::filesystem::file_size(info.dli_fname, error);
    if (error) return "";
    const auto time = std::filesystem::last_write_time(info.dli_fname, error);
    if (error) return "";
    return std::to_string(size) + " bytes of " + std::to_string(time.time_since_epoch().count());
  }

  // A file that cannot be read has none.
  bool has(const std::string& fact) const {
    std::ifstream file(place_);
    for (std::string line; std::getline(file, line);) {
      if (line == as_line(fact)) return true;
    }
    return false;
  }

  // Does nothing where nothing can be written: the next process checks again. One that writes at
  // the same time loses no line.
  void add(const std::string& fact) const {
    constexpr uintmax_t kMost = 1 << 16;  // of builds that are long gone
    if (place_.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(place_.parent_path(), error);
    const auto size = std::filesystem::file_size(place_, error);
    if (!error && size > kMost) std::filesystem::remove(place_, error);
    const std::string line = as_line(fact) + "\n";
    std::ofstream file(place_, std::ios::app | std::ios::binary);
    file.write(line.data(), static_cast<std::streamsize>(line.size())).flush();
  }

 private:
  static std::string as_line(std::string fact) {
    for (char& character : fact) character = character == '\n' ? ' ' : character;
    return fact;
  }

  std::filesystem::path place_;
};

}  // namespace lora_ext
