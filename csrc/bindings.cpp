// lora_ext._C: the eager entry points, without the cost of torch.ops' Python layers, and facts
// about this build.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <variant>
#include <vector>

#include "cpu/capability.h"
#include "cpu/dora_linear.h"
#include "cpu/lora_linear.h"
#include "cpu/quantized_product.h"
#include "cuda/environment.h"
#include "cuda/lora_linear_path.h"
#include "ops/dropout.h"
#include "ops/lora_linear_blas.h"
#include "ops/lora_linear_grouped.h"
#include "ops/lora_linear_multi.h"
#include "ops/lora_linear_quantized.h"
#include "ops/operator.h"
#if defined(LORA_EXT_CUDA_VERSION)
#include "cuda/lora_linear.h"
#include "cuda/lora_linear_grouped.h"
#include "cuda/row_path.h"
#endif

namespace lora_ext {
namespace {

namespace py = pybind11;
using Scaling = std::variant<double, Tensor>;

Tensor bound_lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                         const Tensor& lora_A, const Tensor& lora_B,
                         const OptionalTensor& lora_bias, const Scaling& scaling, double dropout_p,
                         const OptionalTensor& rng_state) {
  LoraLinearCall call{
      x, weight, bias, lora_A, lora_B, lora_bias, {1.0, std::nullopt}, {dropout_p, rng_state}};
  if (const auto* tensor = std::get_if<Tensor>(&scaling)) {
    call.scaling.tensor = *tensor;
  } else {
    call.scaling.number = std::get<double>(scaling);
  }
  if (dropout_p > 0.0 && !rng_state.has_value()) call.dropout.rng_state = draw_rng_state(x);
  return lora_linear(call);
}

Tensor bound_lora_linear_quantized(const Tensor& x, const TensorVector& weight,
                                   const std::vector<int64_t>& layout,
                                   const std::vector<double>& numbers, const OptionalTensor& bias,
                                   const Tensor& lora_A, const Tensor& lora_B,
                                   const OptionalTensor& lora_bias, const Scaling& scaling,
                                   double dropout_p, const OptionalTensor& rng_state) {
  const auto* tensor = std::get_if<Tensor>(&scaling);
  LoraLinearQuantizedCall call{x,
                               {weight, layout, numbers},
                               bias,
                               lora_A,
                               lora_B,
                               lora_bias,
                               {1.0, tensor ? OptionalTensor(*tensor) : std::nullopt},
                               {dropout_p, rng_state}};
  if (!tensor) call.scaling.number = std::get<double>(scaling);
  if (dropout_p > 0.0 && !rng_state.has_value()) call.dropout.rng_state = draw_rng_state(x);
  return lora_linear_quantized(call);
}

std::pair<std::string, std::string> bound_explain_lora_linear_cpu(
    int64_t tokens, int64_t out_features, const Tensor& lora_A, at::ScalarType dtype,
    double dropout_p, bool quantized) {
  std::optional<BasePath> base;
  if (quantized) {
    base = quantized_base_path(tokens, out_features, lora_A.size(1), dtype, /*forward=*/true);
  }
  return explain_lora_linear_cpu(tokens, out_features, lora_A, dtype, dropout_p, base);
}

using Optionals = std::vector<OptionalTensor>;

// Lists have an entry for each layer. State is drawn as calls of bound_lora_linear in this order
// draw it.
TensorVector bound_lora_linear_multi(const Tensor& x, const TensorVector& weights,
                                     const std::optional<Optionals>& biases,
                                     const Optionals& lora_As, const Optionals& lora_Bs,
                                     const std::optional<Optionals>& lora_biases,
                                     const std::vector<Scaling>& scalings,
                                     const std::vector<double>& dropout_p,
                                     const std::optional<Optionals>& rng_states) {
  Tensor none;
  const auto list_of = [&](const Optionals& optionals) {
    TensorVector list;
    list.reserve(optionals.size());
    for (const OptionalTensor& one : optionals) {
      if (!one.has_value() && !none.defined()) none = at::empty({0}, x.options());
      list.push_back(one.has_value() ? *one : none);
    }
    return list;
  };
  const auto check_length = [&](const char* name, const std::optional<Optionals>& optionals) {
    TORCH_CHECK_VALUE(!optionals.has_value() || optionals->size() == weights.size(),
                      "lora_linear_multi: ", name, ": got ", optionals->size(),
                      " entries, expected ", weights.size(), ", one for each of weights, or None");
  };
  check_length("biases", biases);
  check_length("lora_biases", lora_biases);
  check_length("rng_states", rng_states);
  const auto list_of_any = [&](const std::optional<Optionals>& optionals) {
    const auto is_there = [](const OptionalTensor& one) { return one.has_value(); };
    return optionals.has_value() && std::any_of(optionals->begin(), optionals->end(), is_there)
               ? list_of(*optionals)
               : TensorVector();
  };
  std::vector<double> numbers;
  Optionals tensors, states = rng_states.value_or(Optionals(dropout_p.size()));
  for (const Scaling& scaling : scalings) {
    const auto* tensor = std::get_if<Tensor>(&scaling);
    tensors.push_back(tensor ? OptionalTensor(*tensor) : std::nullopt);
    numbers.push_back(tensor ? 1.0 : std::get<double>(scaling));
  }
  for (size_t i = 0; i < std::min({dropout_p.size(), lora_As.size(), states.size()}); ++i) {
    if (lora_As[i].has_value() && dropout_p[i] > 0.0 && !states[i].has_value()) {
      states[i] = draw_rng_state(x);
    }
  }
  const TensorVector A = list_of(lora_As), B = list_of(lora_Bs), bias = list_of_any(biases),
                     lora_bias = list_of_any(lora_biases), scaling_tensor = list_of_any(tensors),
                     rng_state = list_of_any(states);
  return lora_linear_multi(
      {x, weights, bias, A, B, lora_bias, numbers, scaling_tensor, dropout_p, rng_state});
}

Tensor bound_lora_linear_grouped(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                 const TensorVector& lora_As, const TensorVector& lora_Bs,
                                 const TensorVector& lora_biases, const Tensor& order,
                                 const std::vector<int64_t>& counts, const OptionalTensor& factor,
                                 const std::vector<double>& scalings,
                                 const std::vector<double>& dropout_p,
                                 const OptionalTensor& rng_state,
                                 const std::vector<int64_t>& rounds) {
  return lora_linear_grouped({x,
                              weight,
                              bias,
                              lora_As,
                              lora_Bs,
                              lora_biases,
                              order,
                              counts,
                              factor,
                              scalings,
                              dropout_p,
                              rng_state,
                              rounds,
                              {},
                              {}});
}

py::dict build_info() {
  py::dict info;
  info["version"] = LORA_EXT_VERSION;
  info["torch"] = LORA_EXT_TORCH_VERSION;
#if defined(LORA_EXT_CUDA_VERSION)
  info["cuda"] = LORA_EXT_CUDA_VERSION;
  info["cuda_path"] = name_of(cuda_wish()).name;
#else
  info["cuda"] = py::none();
  info["cuda_path"] = py::none();
#endif
  py::list cuda_paths;
  for (const CudaPathName& path : kCudaPaths) cuda_paths.append(path.name);
  check_cuda_environment();  // which a build without CUDA does not use, and tells all the same
  info["cuda_paths"] = cuda_paths;
  info["cpu_capability"] = cpu_capability_name(cpu_capability());
  info["compiler"] = __VERSION__;
  return info;
}

}  // namespace
}  // namespace lora_ext

PYBIND11_MODULE(_C, m) {
  // torch's wrappers turn c10 errors into Python's ValueError, TypeError and so on.
  namespace py = pybind11;
  m.def("lora_linear", torch::wrap_pybind_function_no_gil(&lora_ext::bound_lora_linear),
        py::arg("x"), py::arg("weight"), py::arg("bias"), py::arg("lora_A"), py::arg("lora_B"),
        py::arg("lora_bias") = py::none(), py::arg("scaling") = 1.0, py::arg("dropout_p") = 0.0,
        py::arg("rng_state") = py::none(),
        "lora_linear as a C++ autograd Function; see lora_ext.lora_linear.");
  m.def("lora_linear_quantized",
        torch::wrap_pybind_function_no_gil(&lora_ext::bound_lora_linear_quantized), py::arg("x"),
        py::arg("weight"), py::arg("layout"), py::arg("numbers"), py::arg("bias"),
        py::arg("lora_A"), py::arg("lora_B"), py::arg("lora_bias") = py::none(),
        py::arg("scaling") = 1.0, py::arg("dropout_p") = 0.0, py::arg("rng_state") = py::none(),
        "lora_linear_quantized as a C++ autograd Function; see lora_ext.quant.operator.");
  m.def("lora_linear_multi", torch::wrap_pybind_function_no_gil(&lora_ext::bound_lora_linear_multi),
        py::arg("x"), py::arg("weights"), py::arg("biases"), py::arg("lora_As"), py::arg("lora_Bs"),
        py::arg("lora_biases"), py::arg("scalings"), py::arg("dropout_p"), py::arg("rng_states"),
        "lora_linear_multi as a C++ autograd Function; see lora_ext.lora_linear_multi.");
  m.def("lora_linear_grouped",
        torch::wrap_pybind_function_no_gil(&lora_ext::bound_lora_linear_grouped), py::arg("x"),
        py::arg("weight"), py::arg("bias"), py::arg("lora_As"), py::arg("lora_Bs"),
        py::arg("lora_biases"), py::arg("order"), py::arg("counts"), py::arg("factor"),
        py::arg("scalings"), py::arg("dropout_p"), py::arg("rng_state"), py::arg("rounds"),
        "lora_linear_grouped as a C++ autograd Function; see lora_ext.functional.");
  m.def("composed_fwd",
        torch::wrap_pybind_function_no_gil(*lora_ext::flat<&lora_ext::lora_linear_fwd_composed>),
        "lora_linear_fwd as the GPU composes it of products; on any device, for tests.");
  m.def("composed_bwd",
        torch::wrap_pybind_function_no_gil(*lora_ext::flat<&lora_ext::lora_linear_bwd_composed>),
        "lora_linear_bwd as the GPU composes it of products; on any device, for tests.");
  m.def("explain_lora_linear_cpu",
        torch::wrap_pybind_function(&lora_ext::bound_explain_lora_linear_cpu), py::arg("tokens"),
        py::arg("out_features"), py::arg("lora_A"), py::arg("dtype"), py::arg("dropout_p"),
        py::arg("quantized") = false, "The path of a call on the CPU, and why.");
  m.def("explain_dora_linear_cpu", torch::wrap_pybind_function(&lora_ext::explain_dora_linear_cpu),
        py::arg("tokens"), py::arg("dtype"), py::arg("dropout_p"),
        "Whether DoRA with dropout skips the dense second product on the CPU, and why.");
#if defined(LORA_EXT_CUDA_VERSION)
  py::class_<lora_ext::CudaCall>(m, "CudaCall", "What autotune tells calls on CUDA apart by.")
      .def(py::init(&lora_ext::make_cuda_call), py::kw_only(), py::arg("backward"),
           py::arg("device"), py::arg("tokens"), py::arg("out_features"), py::arg("in_features"),
           py::arg("r"), py::arg("base"), py::arg("adapter"), py::arg("dropout"),
           py::arg("weight") = py::none());
  m.def("explain_lora_linear_cuda",
        torch::wrap_pybind_function(&lora_ext::explain_lora_linear_cuda), py::arg("call"),
        py::arg("compute_capability"), "The path of a call on a GPU of this kind, and why.");
  m.def("explain_lora_linear_grouped_cuda",
        torch::wrap_pybind_function(&lora_ext::explain_lora_linear_grouped_cuda), py::arg("call"),
        py::arg("compute_capability"),
        "The path of a call whose adapters have up to this rank on a GPU of this kind, and why.");
  m.def(
      "explain_rows_cuda", [](at::ScalarType base) { return lora_ext::row_path(base).told(); },
      py::arg("base"), "The path of column_scale, weight_norm, lora_embedding, and why.");
  m.def("has_cuda_kernels", torch::wrap_pybind_function(&lora_ext::has_cuda_kernels),
        py::arg("call"), py::arg("compute_capability"),
        "Whether a GPU of this kind has more than cuBLAS's products for such calls.");
  m.def("set_tuned_cuda_path", torch::wrap_pybind_function(&lora_ext::set_tuned_cuda_path),
        py::arg("call"), py::arg("path"), "What autotune measured for such calls.");
#endif
  m.def("build_info", torch::wrap_pybind_function(&lora_ext::build_info),
        "What this extension was built for, and runs with.");
}
