// Checks and times each pass of the CUDA kernels at full size beside cuBLAS's product, without
// torch. kUsage (options.h) says how it is called; `make gpu-prebuilt` builds it.
#include "options.h"
#include "row.h"
#include "timing.h"

using namespace gpu_bench;

namespace {

struct Machine {
  Cublas cublas;
  Nvml nvml;
  Flush flush;
  std::string device, driver;
};

// What every row of a case begins with.
Row row_of(const Case& c, const std::string& pass) {
  return Row()
      .add("pass", pass)
      .add("family", c.family == KernelFamily::Sm90 ? "sm90" : "sm80")
      .add("M", c.M)
      .add("K", c.K)
      .add("N", c.N)
      .add("r", int64_t{c.r})
      .add("p", c.dropout_p)
      .add("base", "bf16")
      .add("adapters", c.fp32_adapters ? "fp32" : "bf16");
}

void finish_row(Row row, const Machine& machine, const Options& options) {
  row.add("device", machine.device)
      .add("driver", machine.driver)
      .add("sm_mhz", int64_t{machine.nvml.sm_mhz()})
      .add("memory_mhz", int64_t{machine.nvml.memory_mhz()})
      .add("watts", int64_t{machine.nvml.watts()})
      .add("cublas", int64_t{machine.cublas.version()})
      .add("commit", options.commit)
      .print();
}

// Adds what was found; whether all of it is right.
bool add_errors(Row& row, const std::vector<Error>& errors) {
  bool right = true;
  Row sizes, bounds;
  std::string wrong;
  for (const Error& error : errors) {
    right &= error.right();
    sizes.add(error.of.c_str(), error.error);
    bounds.add(error.of.c_str(), error.bound);
    if (error.right()) continue;
    wrong += (wrong.empty() ? "" : "; ") + error.of + ": " + std::to_string(error.not_finite) +
             " not finite or not written, the worst of the others in " + error.worst;
  }
  row.add("ok", right).add("errors", sizes).add("bounds", bounds);
  if (!right) row.add("wrong", wrong);
  return right;
}

Samples sums(const std::vector<const Samples*>& parts) {
  Samples result(parts[0]->size(), 0.0);
  for (const Samples* part : parts) {
    for (size_t i = 0; i < result.size(); ++i) result[i] += (*part)[i];
  }
  return result;
}

// Of passes that follow each other, over their baselines.
void add_times(Row& row, const std::vector<size_t>& which, const std::vector<const Pass*>& passes,
               const std::vector<Times>& times) {
  std::vector<const Samples*> own, host, baseline;
  double flops = 0.0, bytes = 0.0;
  for (const size_t i : which) {
    own.push_back(&times[i].gpu), host.push_back(&times[i].host);
    flops += passes[i]->flops, bytes += passes[i]->bytes;
    for (size_t j = 0; j < passes.size(); ++j) {
      if (passes[j]->name == passes[i]->baseline) baseline.push_back(&times[j].gpu);
    }
  }
  const Samples gpu = sums(own);
  const double median = quantile(gpu, 0.5);
  row.add("us", median).add("us_q1", quantile(gpu, 0.25)).add("us_q3", quantile(gpu, 0.75));
  row.add("host_us", quantile(sums(host), 0.5)).add("rounds", static_cast<int64_t>(gpu.size()));
  row.add("tflops", flops / median * 1e-6).add("tb_per_s", bytes / median * 1e-6);
  if (baseline.size() != which.size()) return;
  const Samples other = sums(baseline);
  Samples ratios;
  for (size_t i = 0; i < gpu.size(); ++i) ratios.push_back(gpu[i] / other[i]);
  row.add("over_cublas", quantile(ratios, 0.5)).add("over_cublas_q1", quantile(ratios, 0.25));
  row.add("over_cublas_q3", quantile(ratios, 0.75)).add("cublas_us", quantile(other, 0.5));
}

// Checks a pass. False: it cannot be timed.
template <class TA>
bool check_pass(Problem<TA>& problem, const Pass& pass, Row& row, bool& all_right) {
  std::fprintf(stderr, "  check %s\n", pass.name.c_str());
  try {
    problem.poison();
    pass.run();
    check(cudaDeviceSynchronize());
    all_right &= add_errors(row, pass.errors());
    return true;
  } catch (const std::exception& error) {
    all_right = false;
    row.add("ok", false).add("wrong", error.what());
    return false;
  }
}

bool wanted(const std::string& name, const Options& options) {
  for (const std::string& word : words(options.without)) {
    if (name == word || name.starts_with(word + " ")) return false;
  }
  if (options.passes.empty()) return true;
  const std::vector<std::string> beginnings = words(options.passes);
  return std::any_of(beginnings.begin(), beginnings.end(),
                     [&](const std::string& word) { return name.starts_with(word); });
}

// Whether every pass of a case is right.
template <class TA>
bool run_case(const Case& c, const Machine& machine, const Options& options) {
  Problem<TA> problem(c);
  Passes<TA> maker(problem, machine.cublas);
  const std::vector<Pass> all = maker.list();
  std::vector<const Pass*> passes;
  std::vector<Row> rows;
  bool right = true;
  for (const Pass& pass : all) {
    if (!wanted(pass.name, options)) continue;
    Row row = row_of(c, pass.name);
    if (check_pass(problem, pass, row, right) && options.rounds > 0) {
      passes.push_back(&pass), rows.push_back(row);
      continue;
    }
    finish_row(row, machine, options);
    check(cudaDeviceSynchronize());  // or no other can run
  }
  if (passes.empty()) return right;
  std::fprintf(stderr, "  time\n");
  const std::vector<Times> times =
      time_passes(passes, machine.flush, options.seconds, options.rounds);
  const auto found = [&](const std::string& name) {
    const auto is = [&](const Pass* pass) { return pass->name == name; };
    return static_cast<size_t>(std::find_if(passes.begin(), passes.end(), is) - passes.begin());
  };
  for (size_t i = 0; i < passes.size(); ++i) {
    add_times(rows[i], {i}, passes, times);
    finish_row(rows[i], machine, options);
  }
  for (const std::string name : {"fused", "hybrid"}) {
    const size_t forward = found(name + " forward"), backward = found(name + " backward");
    if (std::max(forward, backward) == passes.size()) continue;
    Row row = row_of(c, name + " forward+backward");
    add_times(row, {forward, backward}, passes, times);
    finish_row(row, machine, options);
  }
  return right;
}

// All cases of the command line; the exit status.
int run_cases(const Options& options, const Machine& machine) {
  int status = 0;
  const auto one = [&](const Case& c) {
    std::fprintf(stderr, "%s\n", row_of(c, "all").text().c_str());
    try {
      const bool right = c.fp32_adapters ? run_case<float>(c, machine, options)
                                         : run_case<Bf16>(c, machine, options);
      if (!right) status = 1;
    } catch (const std::exception& error) {
      status = 1;
      Row row = row_of(c, "all");
      finish_row(row.add("ok", false).add("wrong", error.what()), machine, options);
    }
    cudaGetLastError();
    if (cudaDeviceSynchronize() != cudaSuccess) status = 3;
    return status != 3;
  };
  for (const std::string& family : words(options.families)) {
    for (const std::string& shape_text : words(options.shapes)) {
      for (const std::string& tokens : words(options.tokens)) {
        for (const std::string& adapters : words(options.adapters)) {
          for (const std::string& rank : words(options.ranks)) {
            for (const std::string& dropout : words(options.dropouts)) {
              const auto [K, N] = shape(shape_text);
              const Case c{family == "sm90" ? KernelFamily::Sm90 : KernelFamily::Sm80,
                           whole(tokens),
                           K,
                           N,
                           int(whole(rank)),
                           number(dropout),
                           adapters == "fp32"};
              if (!one(c)) return status;
            }
          }
        }
      }
    }
  }
  return status;
}

// What no GPU can run; empty if there is nothing of it.
std::string why_not(const Options& options) {
  for (const std::string& family : words(options.families)) {
    if (family != "sm90" && family != "sm80") return "there is no family '" + family + "'";
  }
  for (const std::string& adapters : words(options.adapters)) {
    if (adapters != "bf16" && adapters != "fp32") return "no adapters of type '" + adapters + "'";
  }
  for (const std::string& text : words(options.shapes)) {
    const auto [K, N] = shape(text);
    if (K == 0 || N == 0 || K % 8 != 0 || N % 8 != 0) {
      return "the kernels take sizes that are multiples of 8, not " + text;
    }
  }
  for (const std::string& text : words(options.tokens)) {
    if (whole(text) == 0) return "no case has 0 tokens";
  }
  for (const std::string& text : words(options.ranks)) {
    if (whole(text) == 0 || whole(text) > 1024) return "the kernels take ranks 1 to 1024";
  }
  for (const std::string& text : words(options.dropouts)) {
    if (number(text) >= 1) return "the dropouts timed are below 1";
  }
  return "";
}

int refused(const std::string& reason) {
  std::fprintf(stderr, "bench_kernels: %s\n", reason.c_str());
  return 2;
}

}  // namespace

int main(int count, char** arguments) {
  try {
    if (count == 2 && std::string(arguments[1]) == "--help") return std::printf("%s", kUsage), 0;
    const Options options = parsed(count, arguments);
    if (std::string reason = why_not(options); !reason.empty()) return refused(reason);
    if (std::string reason = gpu_test::why_no_gpu(); !reason.empty()) return refused(reason);
    for (const std::string& family : words(options.families)) {
      if (std::string reason = gpu_test::why_not_here(family); !reason.empty()) {
        return refused(reason);
      }
    }
    int l2_bytes = 0;
    check(cudaDeviceGetAttribute(&l2_bytes, cudaDevAttrL2CacheSize, 0));
    const int64_t flush_bytes =
        options.flush_mib < 0 ? int64_t{8} * l2_bytes : options.flush_mib << 20;
    cudaDeviceProp properties{};
    check(cudaGetDeviceProperties(&properties, 0));
    Machine machine{Cublas(options.cublas), Nvml(), Flush(flush_bytes), properties.name, ""};
    machine.driver = machine.nvml.driver();
    if (!machine.cublas.there()) {
      std::fprintf(stderr, "bench_kernels: without cuBLAS: %s\n", machine.cublas.why().c_str());
    }
    return run_cases(options, machine);
  } catch (const std::invalid_argument& error) {
    return refused(error.what());
  } catch (const std::exception& error) {
    std::fprintf(stderr, "bench_kernels: %s\n", error.what());
    return 1;
  }
}
