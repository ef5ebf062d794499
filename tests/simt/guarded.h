// For the libraries that tests load with ctypes: what went wrong, instead of an exception.
#pragma once

#include <exception>
#include <string>

namespace simt_test {

// Of the last call that failed.
inline std::string& message() {
  static std::string text;
  return text;
}

// 0, or 1 and message() says why.
template <class F>
int guarded(const F& f) {
  try {
    f();
    return 0;
  } catch (const std::exception& error) {
    message() = error.what();
    return 1;
  }
}

}  // namespace simt_test
