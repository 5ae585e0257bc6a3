// The Python module zokern._C: addresses, sizes, scalars and a stream go in, nothing else. No libtorch, so that one
// build serves every version of PyTorch. It trusts its caller: zokern/ops.py has checked everything.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <vector>

#include "cpu/run.h"
#ifdef ZK_WITH_CUDA
#include "cuda/launch.h"
#endif
#include "rule_info.h"

namespace py = pybind11;

namespace {

// What a pass is given as: seeds and rounding_seed are addresses, or 0 where the host knows the one seed there is.
zk::Pass make_pass(uintptr_t tensors, uintptr_t chunks, int64_t num_chunks, uintptr_t coefs, uintptr_t scalars,
                   uintptr_t seeds, int64_t seed, int32_t num_seeds, uintptr_t rounding_seed,
                   int64_t known_rounding_seed, int64_t known_state_seed, uintptr_t enabled, bool rademacher,
                   bool stochastic, bool square_of_sum, bool keep_second) {
  zk::Pass p{};
  p.tensors = reinterpret_cast<const zk::TensorRow*>(tensors);
  p.chunks = reinterpret_cast<const zk::ChunkRow*>(chunks);
  p.num_chunks = num_chunks;
  p.coefs = reinterpret_cast<const float*>(coefs);
  p.scalars = reinterpret_cast<const float*>(scalars);
  p.seeds = reinterpret_cast<const int64_t*>(seeds);
  p.rounding_seed = reinterpret_cast<const int64_t*>(rounding_seed);
  p.enabled = reinterpret_cast<const int32_t*>(enabled);
  p.first_keys = zk::key_schedule(seed);
  p.rounding_keys = zk::key_schedule(known_rounding_seed);
  p.state_keys = zk::key_schedule(known_state_seed);
  p.num_seeds = num_seeds;
  p.rademacher = rademacher;
  p.stochastic = stochastic;
  p.square_of_sum = square_of_sum;
  p.keep_second = keep_second;
  return p;
}

// Stages as rows of addresses and flags, in the order of pass.h's Stage.
zk::Chain make_chain(uintptr_t tensors, uintptr_t chunks, int64_t num_chunks, uintptr_t enabled, bool rademacher,
                     bool fork, bool keep_second, const std::vector<std::array<int64_t, 9>>& stages) {
  if (stages.empty() || stages.size() > size_t(zk::kMaxStages))
    throw std::invalid_argument("zokern: a chain has 1 to 32 stages");
  zk::Chain c{};
  c.tensors = reinterpret_cast<const zk::TensorRow*>(tensors);
  c.chunks = reinterpret_cast<const zk::ChunkRow*>(chunks);
  c.num_chunks = num_chunks;
  c.enabled = reinterpret_cast<const int32_t*>(enabled);
  c.num_stages = int32_t(stages.size());
  c.rademacher = rademacher;
  c.fork = fork;
  c.keep_second = keep_second;
  for (size_t i = 0; i < stages.size(); ++i) {
    const auto& s = stages[i];
    c.stages[i] = {reinterpret_cast<const int64_t*>(s[0]),
                   reinterpret_cast<const float*>(s[1]),
                   reinterpret_cast<const float*>(s[2]),
                   reinterpret_cast<const int64_t*>(s[3]),
                   int32_t(s[4]),
                   int16_t(s[5]),
                   int16_t(s[6]),
                   int16_t(s[7]),
                   int16_t(s[8])};
  }
  return c;
}

py::list rules() {
  using namespace py::literals;
  py::list all;
  for (const zk::RuleInfo& r : zk::rules())
    all.append(py::dict("name"_a = r.name, "direct"_a = r.direct, "coefs"_a = r.coefs, "scalars"_a = r.scalars,
                        "states"_a = r.states, "written"_a = r.written, "squares"_a = r.squares,
                        "perturbation"_a = zk::rules()[size_t(r.perturbation)].name, "half_state"_a = r.half_state));
  return all;
}

#ifdef ZK_WITH_CUDA
void raise_if(const std::string& error) {
  if (!error.empty()) throw std::runtime_error("zokern: " + error);
}
#endif

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "zokern's compiled passes; use zokern.ops, which checks its arguments.";
  py::class_<zk::Pass>(m, "Pass").def(
      py::init(&make_pass), py::kw_only(), py::arg("tensors"), py::arg("chunks"), py::arg("num_chunks"),
      py::arg("coefs"), py::arg("scalars"), py::arg("seeds"), py::arg("seed"), py::arg("num_seeds"),
      py::arg("rounding_seed"), py::arg("known_rounding_seed"), py::arg("known_state_seed"), py::arg("enabled"),
      py::arg("rademacher"), py::arg("stochastic"), py::arg("square_of_sum"), py::arg("keep_second"));

  py::class_<zk::Chain>(m, "Chain")
      .def(py::init(&make_chain), py::kw_only(), py::arg("tensors"), py::arg("chunks"), py::arg("num_chunks"),
           py::arg("enabled"), py::arg("rademacher"), py::arg("fork"), py::arg("keep_second"), py::arg("stages"));
  m.attr("max_stages") = zk::kMaxStages;
  m.attr("max_chain_seeds") = zk::kMaxChainSeeds;

  m.def("rules", &rules, "Each rule of this build, by number: how many of what it has, and which coef is of squares.");
  m.def("cpu_instruction_sets", &zk::cpu::instruction_sets, "Built and supported by this processor, best first.");
  m.def(
      "cpu_run",
      [](const zk::Pass& pass, int rule, int dtype, int state, int threads, const std::string& set) {
        zk::cpu::run(pass, rule, zk::DType(dtype), zk::DType(state), threads, set);
      },
      py::arg("pass_"), py::arg("rule"), py::arg("dtype"), py::arg("state_dtype"), py::arg("threads"),
      py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def(
      "cpu_run_chain",
      [](const zk::Chain& chain, int rule, int dtype, int state, int threads, const std::string& set) {
        zk::cpu::run_chain(chain, rule, zk::DType(dtype), zk::DType(state), threads, set);
      },
      py::arg("chain"), py::arg("rule"), py::arg("dtype"), py::arg("state_dtype"), py::arg("threads"),
      py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
  m.def("cpu_normal_checksum", &zk::cpu::normal_checksum, py::arg("first"), py::arg("last"), py::arg("threads"),
        py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>(),
        "Sum over words of bits(z0)*(2w+1) + bits(z1)*(2w+2), mod 2^64.");

#ifdef ZK_WITH_CUDA
  m.attr("cuda_architectures") = zk::cuda::architectures();
  m.attr("cuda_toolkit") = zk::cuda::toolkit();
  m.def(
      "cuda_run",
      [](const zk::Pass& pass, int rule, int dtype, int state, int device, uintptr_t stream) {
        raise_if(
            zk::cuda::run(pass, rule, zk::DType(dtype), zk::DType(state), device, reinterpret_cast<void*>(stream)));
      },
      py::arg("pass_"), py::arg("rule"), py::arg("dtype"), py::arg("state_dtype"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "cuda_run_chain",
      [](const zk::Chain& chain, int rule, int dtype, int state, int device, uintptr_t stream) {
        raise_if(zk::cuda::run_chain(chain, rule, zk::DType(dtype), zk::DType(state), device,
                                     reinterpret_cast<void*>(stream)));
      },
      py::arg("chain"), py::arg("rule"), py::arg("dtype"), py::arg("state_dtype"), py::arg("device"),
      py::arg("stream"));
  m.def(
      "cuda_normal_checksum",
      [](uint64_t first, uint64_t last, uintptr_t sum, int device, uintptr_t stream) {
        raise_if(zk::cuda::normal_checksum(first, last, reinterpret_cast<uint64_t*>(sum), device,
                                           reinterpret_cast<void*>(stream)));
      },
      py::arg("first"), py::arg("last"), py::arg("sum"), py::arg("device"), py::arg("stream"));
#endif
}
