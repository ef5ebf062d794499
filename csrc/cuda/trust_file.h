// Which kernels were found right on which GPU, by any process before: a file in the folder of
// `autotune`'s, a line for each. Host code without torch and CUDA.
#pragma once

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

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

  // A file that cannot be read has none; the empty lines between facts are none.
  bool has(const std::string& fact) const {
    if (fact.empty()) return false;
    for (const char* which : {"", ".old"}) {
      std::ifstream file(beside(which));
      for (std::string line; std::getline(file, line);) {
        if (line == as_line(fact)) return true;
      }
    }
    return false;
  }

  // Does nothing where nothing can be written: the next process checks again. Those that write at
  // the same time wait for each other, so that no line is lost.
  void add(const std::string& fact) const {
    constexpr uintmax_t kMost = 1 << 16;  // of builds that are long gone
    if (place_.empty()) return;
    std::error_code error;
    std::filesystem::create_directories(place_.parent_path(), error);
    const Lock lock(beside(".lock"));
    const auto size = std::filesystem::file_size(place_, error);
    if (!error && size > kMost) std::filesystem::rename(place_, beside(".old"), error);
    // It may follow what a process could not finish.
    const std::string line = "\n" + as_line(fact) + "\n";
    std::ofstream file(place_, std::ios::app | std::ios::binary);
    file.write(line.data(), static_cast<std::streamsize>(line.size())).flush();
  }

 private:
  // Of one process at a time, if the file system has such.
  class Lock {
   public:
    explicit Lock(const std::filesystem::path& place)
        : file_(open(place.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0666)) {
      if (file_ >= 0) flock(file_, LOCK_EX);
    }
    ~Lock() {
      if (file_ >= 0) close(file_);
    }
    Lock(const Lock&) = delete;
    Lock& operator=(const Lock&) = delete;

   private:
    int file_;
  };

  std::filesystem::path beside(const char* ending) const {
    return std::filesystem::path(place_) += ending;
  }

  static std::string as_line(std::string fact) {
    for (char& character : fact) character = character == '\n' ? ' ' : character;
    return fact;
  }

  std::filesystem::path place_;
};

}  // namespace lora_ext
