// csrc/cuda/trust_file.h by itself: tests/test_trust_file.py runs it in a folder.
#include "cuda/trust_file.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cstdio>
#include <vector>

// has PLACE FACT, add PLACE FACT, or race PLACE: four processes add a fact each, at once
int main(int count, char** arguments) {
  const std::string what = count > 2 ? arguments[1] : "";
  const lora_ext::TrustFile file(count > 2 ? arguments[2] : "");
  if (what == "has") return file.has(arguments[3]) ? 0 : 1;
  if (what == "add") return file.add(arguments[3]), 0;
  if (what != "race") return 2;
  std::vector<pid_t> children;
  for (int i = 0; i < 4; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      file.add("fact " + std::to_string(i));
      _exit(0);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) waitpid(child, nullptr, 0);
  for (int i = 0; i < 4; ++i) {
    if (!file.has("fact " + std::to_string(i))) return 1;
  }
  return 0;
}
