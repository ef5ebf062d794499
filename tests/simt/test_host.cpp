// What the host does around launches: what it asks once and keeps, how scratch is cut, and what is
// told and remembered of kernels.

#define LORA_EXT_SM90
#include <thread>

#include "check.h"
#include "cuda/trust_file.h"
#include "kernels/scratch_blocks.h"
#include "kernels/tensor_map_sm90.h"

namespace {

using namespace lora_ext;
using namespace simt_test;
using arch::Swizzle;

// ---- What is asked of CUDA's runtime and driver ------------------------------------------------

struct Nothing {};
__global__ void first_kernel(Nothing) {}
__global__ void second_kernel(Nothing) {}

int64_t questions_of(const std::function<void()>& function) {
  const int64_t before = simt::questions();
  function();
  return simt::questions() - before;
}

CASE(a_gpu_is_asked_once_what_it_has) {
  const int before = simt::options().multiprocessors;
  for (const int count : {101, 102, 101}) {
    simt::options().multiprocessors = count;
    EXPECT(arch::multiprocessors() == count);
    EXPECT(questions_of([] { arch::multiprocessors(), arch::most_shared_bytes(); }) == 0);
  }
  simt::options().multiprocessors = before;
}

CASE(a_kernel_asks_once_for_shared_memory_on_each_gpu) {
  const auto launch = [](void (*kernel)(Nothing), int bytes) {
    return questions_of([&] { arch::launch(kernel, 1, 32, bytes, nullptr, Nothing{}); });
  };
  const int before = simt::options().multiprocessors;
  for (const int count : {201, 202}) {
    simt::options().multiprocessors = count;
    arch::kernels_overlap();  // asks what the GPU has
    EXPECT(launch(first_kernel, 40 * 1024) == 0);
    EXPECT(launch(first_kernel, 60 * 1024) == 1);
    EXPECT(launch(first_kernel, 50 * 1024) == 0);
    EXPECT(launch(first_kernel, 60 * 1024) == 0);
    EXPECT(launch(second_kernel, 60 * 1024) == 1);
    EXPECT(launch(first_kernel, 61 * 1024) == 1);
    EXPECT(launch(first_kernel, 60 * 1024) == 0);  // and has not got less meanwhile
  }
  simt::options().multiprocessors = before;
}

CASE(shared_memory_that_is_refused_is_asked_for_again) {
  const auto refused = [] {
    return error_of([] { arch::launch(first_kernel, 1, 32, 1 << 20, nullptr, Nothing{}); });
  };
  EXPECT(refused() == refused());
  EXPECT(refused().find("1048576 bytes of shared memory: invalid argument") != std::string::npos);
}

// Nobody reads through these: at addresses of its own the test would meet others now and then.
const auto* const values = reinterpret_cast<const Bf16*>(uintptr_t{1} << 40);

CASE(a_tensor_map_is_made_once) {
  const auto make = [&](Matrix<Bf16> matrix, int rows = 16, Swizzle swizzle = Swizzle::k128) {
    return questions_of([&] { sm90::tensor_map(matrix, rows, 64, swizzle); });
  };
  const Matrix<Bf16> whole{values, 64, 64, 64};
  EXPECT(make(whole) == 1);
  EXPECT(make(whole) == 0);
  EXPECT(make({values + 8, 64, 56, 64}) == 1);
  EXPECT(make({values, 32, 64, 64}) == 1);
  EXPECT(make({values, 32, 64, 128}) == 1);
  EXPECT(make(whole, 8) == 1);
  EXPECT(make(whole, 16, Swizzle::kNone) == 1);
  EXPECT(make(whole) == 0);
  std::thread([&] { EXPECT(make(whole) == 1); }).join();
}

// Many more than are kept, each beside its own values.
CASE(a_kept_tensor_map_is_that_of_its_matrix) {
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 5000; ++i) {
      const Matrix<Bf16> row{values + i * 8, 1, 8, 8};
      const arch::TensorMap map = sm90::tensor_map(row, 1, 8, Swizzle::kNone);
      EXPECT(map.data == reinterpret_cast<const uint8_t*>(row.data) && map.columns == 8);
    }
  }
}

CASE(a_tensor_map_that_is_refused_is_not_kept) {
  const Matrix<Bf16> odd{values + 1, 16, 64, 64};
  for (int i = 0; i < 2; ++i) {
    const std::string error = error_of([&] { sm90::tensor_map(odd, 16, 64, Swizzle::k128); });
    EXPECT(error.find("made no tensor map") != std::string::npos);
  }
}

// ---- Scratch -----------------------------------------------------------------------------------

CASE(scratch_is_cut_out_of_few_blocks) {
  std::vector<std::pair<std::byte*, int64_t>> blocks, pieces;
  std::vector<std::vector<std::byte>> memory;
  ScratchBlocks scratch;
  const auto take = [&](int64_t bytes) {
    auto* const at = static_cast<std::byte*>(scratch.take(bytes, [&](int64_t size) -> void* {
      memory.emplace_back(static_cast<size_t>(size + ScratchBlocks::kAlignment));
      void* place = memory.back().data();
      size_t room = memory.back().size();
      std::align(ScratchBlocks::kAlignment, static_cast<size_t>(size), place, room);
      blocks.emplace_back(static_cast<std::byte*>(place), size);
      return place;
    }));
    pieces.emplace_back(at, bytes);
  };
  const std::vector<int64_t> sizes{0, 1, 255, 256, 257, 1 << 18, (1 << 18) + 1, 1 << 22, 3};
  for (int round = 0; round < 8; ++round) {
    for (const int64_t bytes : sizes) take(bytes);
  }
  // Two of each round are too large for a block that others share; eight others of 256 KiB and
  // some.
  EXPECT(blocks.size() == 2 * 8 + 3);
  for (const auto& [at, bytes] : pieces) {
    EXPECT(reinterpret_cast<uintptr_t>(at) % ScratchBlocks::kAlignment == 0);
    bool inside = false;
    for (const auto& [block, size] : blocks) {
      inside |= at >= block && at + bytes <= block + size;
    }
    EXPECT(inside);
    for (const auto& [other, length] : pieces) {
      EXPECT(at == other || at + std::max<int64_t>(bytes, 1) <= other ||
             other + std::max<int64_t>(length, 1) <= at);
    }
  }
}

// ---- What a stopped kernel tells ---------------------------------------------------------------

CASE(a_report_names_kernel_tile_and_barrier) {
  arch::WaitReport report{};
  EXPECT(report.text(arch::WaitingKernel::kProduct) == "");
  report = {.filled = 1,
            .barrier = 2064,
            .parity = 1,
            .block = 7,
            .thread = 3,
            .row = 256,
            .column = 512};
  const std::string text = report.text(arch::WaitingKernel::kProduct);
  EXPECT(text.find("product_sm90 was stopped") != std::string::npos);
  EXPECT(text.find("block 7, tile from row 256 and column 512, thread 3, mbarrier at byte 2064 of "
                   "shared memory, parity 1") != std::string::npos);
  report.row = -1;
  EXPECT(report.text(arch::WaitingKernel::kLowRank).find("low_rank_sm90") != std::string::npos);
  EXPECT(report.text(arch::WaitingKernel::kLowRank).find("after its last tile") !=
         std::string::npos);
}

// ---- What is remembered of kernels -------------------------------------------------------------

namespace fs = std::filesystem;

// A folder of its own, gone afterwards.
struct Folder {
  fs::path path;
  Folder() {
    std::string name = (fs::temp_directory_path() / "lora_ext-XXXXXX").string();
    EXPECT(mkdtemp(name.data()) != nullptr);
    path = name;
  }
  ~Folder() { fs::remove_all(path); }
};

CASE(what_was_found_right_is_remembered) {
  const Folder folder;
  const TrustFile file(folder.path / "not" / "yet" / "trusted-kernels.txt");
  EXPECT(!file.has("sm_80 on a GPU"));
  file.add("sm_80 on a GPU");
  file.add("of two\nlines");
  EXPECT(file.has("sm_80 on a GPU") && file.has("of two\nlines"));
  EXPECT(!file.has("sm_80") && !file.has("lines") && !file.has(""));
  for (int i = 0; i < 100; ++i) file.add(std::string(1000, 'x'));
  EXPECT(fs::file_size(folder.path / "not" / "yet" / "trusted-kernels.txt") < 70'000);
}

CASE(a_place_that_cannot_be_written_is_no_error) {
  const Folder folder;
  std::ofstream(folder.path / "file") << "no folder";
  for (const fs::path& place :
       {folder.path / "file" / "trusted-kernels.txt", folder.path, fs::path()}) {
    const TrustFile file(place);
    file.add("sm_80 on a GPU");
    EXPECT(!file.has("sm_80 on a GPU"));
  }
}

CASE(threads_lose_no_line) {
  const Folder folder;
  const TrustFile file(folder.path / "trusted-kernels.txt");
  std::vector<std::thread> threads;
  for (int t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 50; ++i) file.add(std::to_string(t) + " and " + std::to_string(i));
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (int t = 0; t < 8; ++t) {
    for (int i = 0; i < 50; ++i) EXPECT(file.has(std::to_string(t) + " and " + std::to_string(i)));
  }
}

CASE(the_place_is_that_of_autotune) {
  setenv("HOME", "/home/me", 1), setenv("XDG_CACHE_HOME", "", 1), unsetenv("LORA_EXT_CACHE");
  EXPECT(TrustFile::default_place() == "/home/me/.cache/lora_ext/trusted-kernels.txt");
  setenv("XDG_CACHE_HOME", "/xdg", 1);
  EXPECT(TrustFile::default_place() == "/xdg/lora_ext/trusted-kernels.txt");
  setenv("LORA_EXT_CACHE", "/mine", 1);
  EXPECT(TrustFile::default_place() == "/mine/trusted-kernels.txt");
  unsetenv("HOME"), unsetenv("XDG_CACHE_HOME"), unsetenv("LORA_EXT_CACHE");
  EXPECT(TrustFile::default_place().empty());
  EXPECT(TrustFile::build() != "" && TrustFile::build() == TrustFile::build());
}

}  // namespace
