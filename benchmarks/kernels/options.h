// The command line of bench_kernels.
#pragma once

#include <cstdlib>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(LORA_EXT_COMMIT)
#define LORA_EXT_COMMIT ""
#endif

namespace gpu_bench {

// The layers of Llama 8B and 70B that the goals name: in_features x out_features.
constexpr const char* kShapes =
    "4096x4096,4096x6144,4096x1024,4096x14336,14336x4096,8192x8192,8192x28672,28672x8192";

struct Options {
  std::string shapes = kShapes, tokens = "8192", ranks = "16", dropouts = "0", adapters = "bf16";
  std::string families = "sm90,sm80", passes, without, cublas, commit = LORA_EXT_COMMIT;
  double seconds = 1.0;
  int rounds = 200;
  int64_t flush_mib = -1;
};

constexpr const char* kUsage =
    R"(bench_kernels: checks and times the passes of lora_linear beside cuBLAS's products.

  --shapes KxN,...      in_features x out_features (those of the goals)
  --tokens M,...        rows of x (8192)
  --ranks r,...         (16)
  --dropouts p,...      (0)
  --adapters t,...      bf16, fp32 (bf16)
  --families f,...      sm90, sm80 (both)
  --passes name,...     only those whose name begins so, e.g. "product,cublas" (all)
  --without word,...    none whose name has this first word, e.g. "product,fused"
  --rounds n            at most; 0 checks and times nothing (200)
  --seconds s           of rounds, for each case (1)
  --flush-mib n         read between two passes, to empty the L2 cache (8 times its size)
  --cublas path         the library (libcublas.so.13 or .12 where the loader finds it)
  --commit name         for the rows (of the sources that it was built from)

One line of JSON for each pass. Exit status: 0 all is right; 1 a pass is wrong or fails; 2 the
command line is wrong, or there is no GPU to run on; 3 CUDA answers nothing any more.
)";

inline std::vector<std::string> words(const std::string& text, char separator = ',') {
  std::vector<std::string> result;
  std::istringstream stream(text);
  for (std::string word; std::getline(stream, word, separator);) result.push_back(word);
  return result;
}

inline double number(const std::string& text) {
  char* end = nullptr;
  const double value = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0' || !(value >= 0)) {
    throw std::invalid_argument("'" + text + "' is no number from 0 on");
  }
  return value;
}

inline int64_t whole(const std::string& text) {
  const double value = number(text);
  if (value != double(int64_t(value))) throw std::invalid_argument("'" + text + "' is not whole");
  return int64_t(value);
}

inline std::pair<int64_t, int64_t> shape(const std::string& text) {
  const std::vector<std::string> sizes = words(text, 'x');
  if (sizes.size() != 2)
    throw std::invalid_argument("'" + text + "' is no shape such as 4096x1024");
  return {whole(sizes[0]), whole(sizes[1])};
}

// Throws std::invalid_argument with what is wrong.
inline Options parsed(int count, char** arguments) {
  Options options;
  const std::pair<const char*, std::string*> texts[] = {
      {"--shapes", &options.shapes},     {"--tokens", &options.tokens},
      {"--ranks", &options.ranks},       {"--dropouts", &options.dropouts},
      {"--adapters", &options.adapters}, {"--families", &options.families},
      {"--passes", &options.passes},     {"--without", &options.without},
      {"--cublas", &options.cublas},     {"--commit", &options.commit}};
  for (int i = 1; i < count; i += 2) {
    const std::string name = arguments[i];
    if (i + 1 == count) throw std::invalid_argument(name + " has no value, or is no option");
    const std::string value = arguments[i + 1];
    std::string* text = nullptr;
    for (const auto& [known, field] : texts) text = name == known ? field : text;
    if (text) {
      *text = value;
    } else if (name == "--rounds") {
      options.rounds = int(whole(value));
    } else if (name == "--seconds") {
      options.seconds = number(value);
    } else if (name == "--flush-mib") {
      options.flush_mib = whole(value);
    } else {
      throw std::invalid_argument("there is no option " + name);
    }
  }
  return options;
}

}  // namespace gpu_bench
