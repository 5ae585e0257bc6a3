// The Python module zokern._C: addresses, sizes, scalars and a stream go in, nothing else. No libtorch, so that one
// build serves every version of PyTorch. It trusts its caller: zokern/passes/operands.py has checked the
// tensors, zokern/ops.py or the optimizer the numbers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cmath>
#include <stdexcept>
#include <vector>

#include "cpu/run.h"
#ifdef ZK_WITH_CUDA
#include "cuda/launch.h"
#endif
#include "rule_info.h"

namespace py = pybind11;

namespace {

// Addresses of a table's rows and chunks, and the number of its chunks; a pass's flags in the order of pass.h's Pass.
using Place = std::array<int64_t, 3>;
using Flags = std::array<bool, 4>;
// Addresses of a table's factor rows and of the factors, the numbers of a seed, and the rank; zeros where there are
// none.
using FactorPlace = std::array<int64_t, 4>;

zk::Factors make_factors(const FactorPlace& place) {
  return {reinterpret_cast<const zk::FactorRow*>(place[0]), reinterpret_cast<const float*>(place[1]), place[2],
          int32_t(place[3])};
}

// A pass by its addresses, 0 for what it has not. Where the host has the seeds, one of them travels in the launch
// itself, and so do rounding seeds.
zk::Pass make_pass(const Place& table, const Flags& flags, uintptr_t seeds, int32_t num_seeds, bool seeds_on_host,
                   uintptr_t coefs, uintptr_t scalars, uintptr_t rounding_seed, bool rounding_on_host,
                   uintptr_t enabled, const FactorPlace& factors) {
  zk::Pass p{};
  p.tensors = reinterpret_cast<const zk::TensorRow*>(table[0]);
  p.chunks = reinterpret_cast<const zk::ChunkRow*>(table[1]);
  p.num_chunks = table[2];
  p.coefs = reinterpret_cast<const float*>(coefs);
  p.scalars = reinterpret_cast<const float*>(scalars);
  p.enabled = reinterpret_cast<const int32_t*>(enabled);
  p.seeds = reinterpret_cast<const int64_t*>(seeds);
  p.num_seeds = num_seeds;
  p.rounding_seed = reinterpret_cast<const int64_t*>(rounding_seed);
  if (seeds_on_host && num_seeds == 1) {
    p.first_keys = zk::key_schedule(p.seeds[0]);
    p.seeds = nullptr;
  }
  if (rounding_on_host && p.rounding_seed != nullptr) {
    p.rounding_keys = zk::key_schedule(p.rounding_seed[0]);
    p.state_keys = zk::key_schedule(p.rounding_seed[1]);
    p.rounding_seed = nullptr;
  }
  p.rademacher = flags[0];
  p.stochastic = flags[1];
  p.square_of_sum = flags[2];
  p.keep_second = flags[3];
  p.factors = make_factors(factors);
  return p;
}

// Stages as rows of addresses and flags, in the order of pass.h's Stage.
zk::Chain make_chain(uintptr_t tensors, uintptr_t chunks, int64_t num_chunks, uintptr_t enabled, bool rademacher,
                     bool fork, bool keep_second, const FactorPlace& factors,
                     const std::vector<std::array<int64_t, 10>>& stages) {
  if (stages.empty() || stages.size() > size_t(zk::kMaxStages))
    throw std::invalid_argument("zokern: a chain has 1 to 32 stages");
  zk::Chain c{};
  c.tensors = reinterpret_cast<const zk::TensorRow*>(tensors);
  c.chunks = reinterpret_cast<const zk::ChunkRow*>(chunks);
  c.num_chunks = num_chunks;
  c.enabled = reinterpret_cast<const int32_t*>(enabled);
  c.factors = make_factors(factors);
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
                   reinterpret_cast<const float*>(s[9]),
                   int32_t(s[4]),
                   int16_t(s[5]),
                   int16_t(s[6]),
                   int16_t(s[7]),
                   int16_t(s[8])};
  }
  return c;
}

// How a table's factors are made: addresses of its sides and their chunks, and the number of these.
zk::FactorFill make_fill(const Place& sides, uintptr_t seeds, int32_t num_seeds, bool seeds_on_host, uintptr_t values,
                         int64_t of_seed, int32_t rank) {
  zk::FactorFill f{};
  f.sides = reinterpret_cast<const zk::FactorSide*>(sides[0]);
  f.chunks = reinterpret_cast<const zk::ChunkRow*>(sides[1]);
  f.num_chunks = sides[2];
  f.seeds = reinterpret_cast<const int64_t*>(seeds);
  f.num_seeds = num_seeds;
  if (seeds_on_host && num_seeds == 1) {
    f.first_keys = zk::key_schedule(f.seeds[0]);
    f.seeds = nullptr;
  }
  f.values = reinterpret_cast<float*>(values);
  f.of_seed = of_seed;
  f.scale = float(1.0 / std::sqrt(double(rank)));
  return f;
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
  m.doc() = "zokern's compiled passes; use zokern.add_noise_, which checks its arguments.";
  py::class_<zk::Pass>(m, "Pass").def(py::init(&make_pass), py::arg("table"), py::arg("flags"), py::arg("seeds"),
                                      py::arg("num_seeds"), py::arg("seeds_on_host"), py::arg("coefs"),
                                      py::arg("scalars"), py::arg("rounding_seed"), py::arg("rounding_on_host"),
                                      py::arg("enabled"), py::arg("factors"));
  py::class_<zk::FactorFill>(m, "FactorFill")
      .def(py::init(&make_fill), py::arg("sides"), py::arg("seeds"), py::arg("num_seeds"), py::arg("seeds_on_host"),
           py::arg("values"), py::arg("of_seed"), py::arg("rank"));

  py::class_<zk::Chain>(m, "Chain")
      .def(py::init(&make_chain), py::kw_only(), py::arg("tensors"), py::arg("chunks"), py::arg("num_chunks"),
           py::arg("enabled"), py::arg("rademacher"), py::arg("fork"), py::arg("keep_second"), py::arg("factors"),
           py::arg("stages"));
  m.attr("max_stages") = zk::kMaxStages;
  m.attr("max_chain_seeds") = zk::kMaxChainSeeds;
  m.attr("factor_slack") = zk::kFactorSlack;

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
  m.def(
      "cpu_fill_factors",
      [](const zk::FactorFill& fill, int threads, const std::string& set) {
        zk::cpu::fill_factors(fill, threads, set);
      },
      py::arg("fill"), py::arg("threads"), py::arg("instruction_set"), py::call_guard<py::gil_scoped_release>());
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
      "cuda_fill_factors",
      [](const zk::FactorFill& fill, int device, uintptr_t stream) {
        raise_if(zk::cuda::fill_factors(fill, device, reinterpret_cast<void*>(stream)));
      },
      py::arg("fill"), py::arg("device"), py::arg("stream"));
  m.def(
      "cuda_normal_checksum",
      [](uint64_t first, uint64_t last, uintptr_t sum, int device, uintptr_t stream) {
        raise_if(zk::cuda::normal_checksum(first, last, reinterpret_cast<uint64_t*>(sum), device,
                                           reinterpret_cast<void*>(stream)));
      },
      py::arg("first"), py::arg("last"), py::arg("sum"), py::arg("device"), py::arg("stream"));
#endif
}
