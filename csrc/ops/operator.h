// Typed handles of operators, for calls through torch's dispatcher.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace lora_ext {

template <class Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace lora_ext
