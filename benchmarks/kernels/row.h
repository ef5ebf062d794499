// A row of results: one line of JSON, written as soon as it is known.
#pragma once

#include <cmath>
#include <cstdio>
#include <string>

namespace gpu_bench {

class Row {
 public:
  Row& add(const char* name, const std::string& text) {
    std::string quoted = "\"";
    for (const char c : text) {
      if (c == '"' || c == '\\') quoted += '\\';
      quoted += static_cast<unsigned char>(c) < 32 ? ' ' : c;
    }
    return raw(name, quoted + '"');
  }
  Row& add(const char* name, const char* text) { return add(name, std::string(text)); }
  Row& add(const char* name, bool value) { return raw(name, value ? "true" : "false"); }
  Row& add(const char* name, int64_t value) { return raw(name, std::to_string(value)); }
  // JSON has no NaN.
  Row& add(const char* name, double value) {
    char text[40];
    std::snprintf(text, sizeof(text), "%.5g", value);
    return raw(name, std::isfinite(value) ? text : "null");
  }
  Row& add(const char* name, const Row& inner) { return raw(name, inner.text()); }
  std::string text() const { return "{" + fields_ + "}"; }
  void print() const {
    std::printf("%s\n", text().c_str());
    std::fflush(stdout);
  }

 private:
  Row& raw(const char* name, const std::string& value) {
    fields_ += (fields_.empty() ? "\"" : ", \"") + std::string(name) + "\": " + value;
    return *this;
  }
  std::string fields_;
};

}  // namespace gpu_bench
