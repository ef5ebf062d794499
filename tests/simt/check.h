// What the test programs share: named cases, a main() that runs them, schedules, and matrices.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/arch/arch.h"

namespace simt_test {

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Case {
  const char* name;
  void (*run)();
  bool alone;  // ends the program, so that it runs only when it is asked for
};

inline std::vector<Case>& cases() {
  static std::vector<Case> instance;
  return instance;
}

struct Registration {
  Registration(const char* name, void (*run)(), bool alone = false) {
    cases().push_back({name, run, alone});
  }
};

#define CASE(name)                                                   \
  static void name();                                                \
  static const simt_test::Registration register_##name(#name, name); \
  static void name()

#define CASE_ALONE(name)                                                   \
  static void name();                                                      \
  static const simt_test::Registration register_##name(#name, name, true); \
  static void name()

#define EXPECT(condition)                                                               \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      throw simt_test::Failure(std::string(__FILE__) + ":" + std::to_string(__LINE__) + \
                               ": not so: " #condition);                                \
    }                                                                                   \
  } while (false)

// The error that the function ends with.
inline std::string error_of(const std::function<void()>& function) {
  try {
    function();
  } catch (const Failure&) {
    throw;
  } catch (const std::runtime_error& error) {
    return error.what();
  }
  return "no error";
}

inline void expect_error(const std::function<void()>& function,
                         const std::vector<std::string>& parts) {
  const std::string error = error_of(function);
  for (const std::string& part : parts) {
    if (error.find(part) == std::string::npos) {
      throw Failure("expected an error with \"" + part + "\", got: " + error);
    }
  }
}

// With -x each case runs in its first schedule before any runs in the others: most of what is wrong
// is so in all.
inline bool first_schedule_only = false, schedules_left_out = false;

// Every schedule that a kernel has to be right in.
inline void for_each_schedule(uint64_t seeds, const std::function<void()>& function) {
  using simt::Completion;
  constexpr Completion kPairs[][2] = {{Completion::kEager, Completion::kEager},
                                      {Completion::kDeferred, Completion::kDeferred},
                                      {Completion::kEager, Completion::kDeferred},
                                      {Completion::kRandom, Completion::kRandom}};
  for (const auto& [copies, multiplies] : kPairs) {
    for (uint64_t seed = 0; seed < seeds; ++seed) {
      simt::options() = {};
      simt::options().copies = copies;
      simt::options().multiplies = multiplies;
      simt::options().seed = seed;
      function();
      if (first_schedule_only) {
        schedules_left_out = true;
        simt::options() = {};
        return;
      }
    }
  }
  simt::options() = {};
}
inline void for_each_schedule(const std::function<void()>& function) {
  for_each_schedule(4, function);
}

// In how many schedules the function ends with an error or returns false.
inline int schedules_that_catch(const std::function<bool()>& function) {
  int caught = 0;
  for_each_schedule([&] {
    bool right = false;
    const std::string error = error_of([&] { right = function(); });
    caught += !right || error != "no error";
  });
  return caught;
}

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <class T>
std::vector<T> normal_values(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  std::vector<T> values(count);
  for (T& value : values) lora_ext::from_float(normal(generator), value);
  return values;
}

// Sums of a few of them are exact in float, in any order.
template <class T>
std::vector<T> small_integers(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::uniform_int_distribution<int> uniform(-4, 4);
  std::vector<T> values(count);
  for (T& value : values) lora_ext::from_float(static_cast<float>(uniform(generator)), value);
  return values;
}

}  // namespace simt_test

// Runs all cases, or those that are named; with -x first, none after one that failed.
int main(int argc, char** argv) {
  using namespace simt_test;
  int failed = 0, ran = 0;
  const bool stop = argc > 1 && std::strcmp(argv[1], "-x") == 0;
  if (stop) --argc, ++argv;
  const auto run_case = [&](const Case& one) {
    simt::options() = {};
    try {
      one.run();
      if (!schedules_left_out) std::printf("ok      %s\n", one.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED  %s: %s\n", one.name, error.what());
    }
    std::fflush(stdout);
  };
  std::vector<Case> again;
  for (const Case& one : cases()) {
    bool wanted = argc == 1 && !one.alone;
    for (int i = 1; i < argc; ++i) wanted |= std::strcmp(argv[i], one.name) == 0;
    if (!wanted || (stop && failed != 0)) continue;
    ++ran;
    first_schedule_only = stop, schedules_left_out = false;
    run_case(one);
    if (schedules_left_out) again.push_back(one);
  }
  first_schedule_only = schedules_left_out = false;
  for (const Case& one : again) {
    if (failed == 0) run_case(one);
  }
  std::printf("%d cases, %d failed\n", ran, failed);
  return failed != 0 || ran == 0;
}
