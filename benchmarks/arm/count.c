// A plugin for QEMU's user mode (plugin interface 1, QEMU 6.0 to 8.2): how many guest instructions are executed in the
// address ranges that the guest names. One guest thread; a block is counted as it is entered.
//
// The guest asks with a system call that Linux does not have, number 31339: (begin, end) adds a range, whose code must
// not have run before, and (0, 0) prints the count since the last time and starts anew.
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#define MARKER 31339
#define RANGES 16

// What is used of QEMU's interface; distributions have no header for it.
struct qemu_plugin_tb;
enum { ADD_U64 = 0 };
typedef void (*TranslateCallback)(uint64_t id, struct qemu_plugin_tb* block);
typedef void (*SyscallCallback)(uint64_t id, unsigned cpu, int64_t number, uint64_t, uint64_t, uint64_t, uint64_t,
                                uint64_t, uint64_t, uint64_t, uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb* block);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb* block);
void qemu_plugin_register_vcpu_tb_trans_cb(uint64_t id, TranslateCallback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb* block, int operation, void* at, uint64_t by);
void qemu_plugin_register_vcpu_syscall_cb(uint64_t id, SyscallCallback);

__attribute__((visibility("default"))) int qemu_plugin_version = 1;

static uint64_t executed, begins[RANGES], ends[RANGES];
static int ranges;

static void translated(uint64_t id, struct qemu_plugin_tb* block) {
  (void)id;
  const uint64_t at = qemu_plugin_tb_vaddr(block);
  for (int i = 0; i < ranges; ++i)
    if (begins[i] <= at && at < ends[i])
      qemu_plugin_register_vcpu_tb_exec_inline(block, ADD_U64, &executed, qemu_plugin_tb_n_insns(block));
}

static void called(uint64_t id, unsigned cpu, int64_t number, uint64_t begin, uint64_t end, uint64_t a3, uint64_t a4,
                   uint64_t a5, uint64_t a6, uint64_t a7, uint64_t a8) {
  (void)id, (void)cpu, (void)a3, (void)a4, (void)a5, (void)a6, (void)a7, (void)a8;
  if (number != MARKER) return;
  if (end != 0 && ranges < RANGES) {
    begins[ranges] = begin;
    ends[ranges++] = end;
  } else if (end == 0) {
    printf("%llu\n", (unsigned long long)executed);
    fflush(stdout);
    executed = 0;
  }
}

__attribute__((visibility("default"))) int qemu_plugin_install(uint64_t id, const void* info, int argc, char** argv) {
  (void)info, (void)argc, (void)argv;
  qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
  qemu_plugin_register_vcpu_syscall_cb(id, called);
  return 0;
}
