// The threads that a pass runs on.
#pragma once
#include <cstdint>

namespace zk {
namespace cpu {

// Calls body(data) on `threads` threads, this one among them, and returns when all are done. On fewer where no more can
// be had, or where threads would have to be started for less than a piece of work each. body must not throw.
void on_threads(int threads, int64_t pieces, void (*body)(void*), void* data);

}  // namespace cpu
}  // namespace zk
