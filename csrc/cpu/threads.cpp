// Passes run on the threads of torch's own operators. These wait for the next operator at full speed, for milliseconds,
// so a thread of ours would share a core with one of them: 0.1 to 3 ms a pass on two cores. torch's team is OpenMP's,
// and is reached through the entry point that compilers call, in the OpenMP library that torch was bound to.
//
// Where there is none, and in a child of a fork, which has inherited a team without its threads and would wait for them
// for ever, threads are started for the pass and joined at its end, 20 to 30 microseconds each. A child that loads this
// library only after the fork cannot tell; torch's own operators hang there too, unless it has one thread, as a data
// loader's worker does.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <dlfcn.h>
#include <pthread.h>
#endif

namespace zk {
namespace cpu {
namespace {

// GNU's name, which LLVM's and Intel's libraries have too: body, its argument, threads, flags.
using Team = void (*)(void (*)(void*), void*, unsigned, unsigned);

#if defined(__linux__)
std::atomic<bool> forked{false};
const int watched = pthread_atfork(nullptr, nullptr, [] { forked = true; });

// In the linker's order: what the whole process sees, which may be a library that was preloaded, then torch's own
// libraries. Its wheels for Arm show theirs to nobody else.
Team openmp() {
  void* found = dlsym(RTLD_DEFAULT, "GOMP_parallel");
  if (found == nullptr)
    if (void* const torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(torch, "GOMP_parallel");
  return reinterpret_cast<Team>(found);
}

Team team() {
  static const Team found = openmp();
  return watched == 0 && !forked ? found : nullptr;
}
#else
Team team() {
  return nullptr;
}
#endif

}  // namespace

void on_threads(int threads, int64_t pieces, void (*body)(void*), void* data) {
  if (threads <= 1 || pieces <= 1) return body(data);
  // A team of another size than torch's would end threads, or start some, here and again in the next operator.
  if (const Team openmp = team()) return openmp(body, data, unsigned(threads), 0);
  threads = int(std::min<int64_t>(threads, pieces));
  std::vector<std::thread> helpers;
  helpers.reserve(size_t(threads - 1));
  try {
    for (int t = 1; t < threads; ++t) helpers.emplace_back(body, data);
  } catch (const std::system_error&) {
    // No further thread to be had: those that started, and this one, do the work.
  }
  body(data);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace cpu
}  // namespace zk
