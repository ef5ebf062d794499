// From an operator's C++ function to the dispatcher's, and back. The C++ function is the one
// definition of the signature. Where arguments are many they are the fields of a struct, its first
// parameter: fields() ties them in the order of the schema, and the dispatcher passes each alone.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>
#include <tuple>

namespace lora_ext {

template <class T>
concept CallStruct = requires(const T& call) { call.fields(); };

template <CallStruct Call>
constexpr size_t kFields = std::tuple_size_v<decltype(std::declval<const Call&>().fields())>;

// How the dispatcher passes a field: tensors by reference, everything else by value.
template <class T>
struct AsArgument {
  using Type = T;
};
template <>
struct AsArgument<at::Tensor> {
  using Type = const at::Tensor&;
};
template <>
struct AsArgument<std::optional<at::Tensor>> {
  using Type = const std::optional<at::Tensor>&;
};

template <auto f, class Call, class Fields, class Result, class... More>
struct FlatCall;
template <auto f, class Call, class... Fields, class Result, class... More>
struct FlatCall<f, Call, std::tuple<const Fields&...>, Result, More...> {
  static Result function(typename AsArgument<Fields>::Type... fields, More... more) {
    return f(Call{fields...}, more...);
  }
};

// `function`: f as the dispatcher calls it.
template <auto f, class Function = decltype(f)>
struct Flat {
  static constexpr Function function = f;
};
template <auto f, class Result, CallStruct Call, class... More>
struct Flat<f, Result (*)(const Call&, More...)>
    : FlatCall<f, Call, decltype(std::declval<const Call&>().fields()), Result, More...> {};

// For m.impl(name, flat<&f>)
template <auto f>
inline constexpr auto flat = &*Flat<f>::function;

// The operator of f's signature, called through the dispatcher with f's arguments.
template <auto f>
class Operator {
 public:
  explicit Operator(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>()) {}

  template <class First, class... More>
  auto operator()(const First& first, const More&... more) const {
    if constexpr (CallStruct<First>) {
      return std::apply([&](const auto&... fields) { return handle_.call(fields..., more...); },
                        first.fields());
    } else {
      return handle_.call(first, more...);
    }
  }

 private:
  using Signature = std::remove_pointer_t<decltype(flat<f>)>;
  c10::TypedOperatorHandle<Signature> handle_;
};

}  // namespace lora_ext
