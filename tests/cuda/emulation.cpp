// The GPU of csrc/common/emulation.h.
#include "common/emulation.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace effkernels::emulation {
namespace {

constexpr int kLanes = 32, kMostThreads = 1024;
constexpr size_t kStack = 256 << 10;
constexpr int kExchange = 64;  // bytes a lane may exchange

enum class State { ready, at_block_barrier, at_warp_barrier, returned };

struct Copy {  // an asynchronous one under way
  void* to;
  std::vector<unsigned char> bytes;
  int group;
};

struct Fiber {
  ucontext_t context;
  void* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  State state = State::ready;
  Place place{};
  std::deque<Copy> copies;
  int groups = 0;  // of copies, committed
};

struct Warp {
  unsigned char buffer[2][kLanes][kExchange];
  unsigned exchanges = 0;  // so far; odd and even ones use a buffer each
  unsigned epoch = 0;      // counts __syncwarp
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  unsigned char* shared_begin = nullptr;
  int64_t shared_size = 0;
  unsigned epoch = 0;  // counts __syncthreads
  int64_t number = 0;
  int running = -1;
  std::exception_ptr error;
  const std::function<void()>* kernel = nullptr;
  ucontext_t scheduler;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_stack_size = 0;
};

Block block;
Options current_options;
Device current_device;
std::mt19937_64 random_order;

void switch_to_scheduler(bool last);

// From a kernel the launch fails, without unwinding: the compiler does not expect its hooks to
// throw.
[[noreturn]] void fail(const std::string& message) {
  if (block.running < 0) throw std::runtime_error(message);
  block.error = std::make_exception_ptr(std::runtime_error(message));
  switch_to_scheduler(true);
  std::abort();
}

std::string describe(Place place) {
  const char* name = std::strstr(place.file, "csrc/");
  return std::string(name ? name : place.file) + ":" + std::to_string(place.line);
}

// ---- The race detector. Bytes that threads of a launch share remember who wrote and read them.

struct Access {
  int32_t block = -1;
  int16_t thread = -1;
  uint16_t block_epoch = 0, warp_epoch = 0;
};

struct Byte {
  Access writer, reader, other_reader;
  bool written = false;
  bool in_flight = false;  // being written by an asynchronous copy
};

constexpr uintptr_t kPage = 4096;
struct Page {
  unsigned launch = 0;  // what its bytes remember is of this launch
  Byte bytes[kPage];
};

std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;  // of global memory
std::vector<Byte> shared_bytes;
unsigned launches = 0;

bool is_shared(uintptr_t address) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block.shared_begin);
  return address >= begin && address < begin + static_cast<uintptr_t>(block.shared_size);
}

bool is_on_stack(uintptr_t address) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(block.fibers[block.running].stack);
  return address >= begin && address < begin + kStack;
}

Byte& byte_at(uintptr_t address) {
  if (is_shared(address)) {
    return shared_bytes[address - reinterpret_cast<uintptr_t>(block.shared_begin)];
  }
  static uintptr_t last = 0;
  static Page* page = nullptr;
  if (page == nullptr || last != address / kPage) {
    last = address / kPage;
    std::unique_ptr<Page>& found = pages[last];
    if (!found) found = std::make_unique<Page>();
    page = found.get();
  }
  if (page->launch != launches) {
    std::fill(std::begin(page->bytes), std::end(page->bytes), Byte{});
    page->launch = launches;
  }
  return page->bytes[address % kPage];
}

Access here() {
  const int thread = block.running;
  return {static_cast<int32_t>(block.number), static_cast<int16_t>(thread),
          static_cast<uint16_t>(block.epoch),
          static_cast<uint16_t>(block.warps[thread / kLanes].epoch)};
}

// Whether `before` is sure to have happened when `now` does.
bool ordered(const Access& before, const Access& now) {
  if (before.thread < 0) return true;
  if (before.block != now.block) return false;
  if (before.thread == now.thread || before.block_epoch != now.block_epoch) return true;
  return before.thread / kLanes == now.thread / kLanes && before.warp_epoch != now.warp_epoch;
}

[[noreturn]] void report(const char* what, uintptr_t address, const Access& before,
                         const Access& now) {
  std::ostringstream message;
  message << "race: " << what << " in ";
  if (is_shared(address)) {
    message << "byte " << address - reinterpret_cast<uintptr_t>(block.shared_begin)
            << " of shared memory";
  } else {
    message << "global memory";
  }
  message << ": block " << before.block << " thread " << before.thread << ", then block "
          << now.block << " thread " << now.thread;
  fail(message.str());
}

void access(const void* pointer, size_t size, bool write) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  if (block.running < 0 || is_on_stack(begin)) return;
  const Access now = here();
  for (uintptr_t address = begin; address < begin + size; address++) {
    Byte& byte = byte_at(address);
    if (byte.in_flight) fail("race: an access to memory that an asynchronous copy is writing");
    if (!ordered(byte.writer, now)) {
      report(write ? "two writes" : "a write and a read", address, byte.writer, now);
    }
    if (write) {
      for (const Access& reader : {byte.reader, byte.other_reader}) {
        if (!ordered(reader, now)) report("a read and a write", address, reader, now);
      }
      byte.writer = now;
      byte.written = true;
      byte.reader = byte.other_reader = Access{};
      continue;
    }
    if (is_shared(address) && !byte.written) fail("a read of shared memory that nobody wrote");
    if (byte.reader.thread != now.thread || byte.reader.block != now.block) {
      byte.other_reader = byte.reader;
    }
    byte.reader = now;
  }
}

void mark_in_flight(const void* pointer, size_t size, bool in_flight) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(pointer);
  for (size_t i = 0; i < size; i++) byte_at(begin + i).in_flight = in_flight;
}

bool detects_races = false;  // the hooks below are called

// ---- Fibers

void* new_stack() {
  void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (stack == MAP_FAILED) fail("no memory for a thread's stack");
  return stack;
}

void switch_to_scheduler(bool last) {
  Fiber& fiber = block.fibers[block.running];
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, block.scheduler_stack,
                                 block.scheduler_stack_size);
#endif
  swapcontext(&fiber.context, &block.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
  (void)last;
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block.scheduler_stack, &block.scheduler_stack_size);
#endif
  Fiber& fiber = block.fibers[block.running];
  try {
    (*block.kernel)();
    if (!fiber.copies.empty()) fail("a thread returned with asynchronous copies under way");
  } catch (...) {
    if (!block.error) block.error = std::current_exception();
  }
  fiber.state = State::returned;
  switch_to_scheduler(true);
}

void resume(int thread) {
  Fiber& fiber = block.fibers[thread];
  block.running = thread;
  threadIdx = {static_cast<unsigned>(thread), 0, 0};
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&block.scheduler_fake_stack, fiber.stack, kStack);
#endif
  swapcontext(&block.scheduler, &fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(block.scheduler_fake_stack, nullptr, nullptr);
#endif
  block.running = -1;
}

bool same(Place a, Place b) { return a.line == b.line && std::strcmp(a.file, b.file) == 0; }

// Lets a whole warp go on if all its lanes wait at one place. Returns whether it does.
bool release_warp(int warp, int threads) {
  const int begin = warp * kLanes, end = std::min(begin + kLanes, threads);
  for (int t = begin; t < end; t++) {
    if (block.fibers[t].state != State::at_warp_barrier) return false;
    if (!same(block.fibers[t].place, block.fibers[begin].place)) return false;
  }
  for (int t = begin; t < end; t++) block.fibers[t].state = State::ready;
  return true;
}

bool release_block(int threads) {
  for (int t = 0; t < threads; t++) {
    if (block.fibers[t].state != State::at_block_barrier) return false;
    if (!same(block.fibers[t].place, block.fibers[0].place)) return false;
  }
  for (int t = 0; t < threads; t++) block.fibers[t].state = State::ready;
  block.epoch++;
  return true;
}

[[noreturn]] void report_divergence(int threads) {
  std::ostringstream message;
  message << "threads wait for each other for ever:";
  std::vector<std::string> seen;
  for (int t = 0; t < threads; t++) {
    const Fiber& fiber = block.fibers[t];
    std::string what = fiber.state == State::returned ? "has returned"
                       : fiber.state == State::at_block_barrier
                           ? "at the barrier of " + describe(fiber.place)
                           : "at the warp's operation of " + describe(fiber.place);
    if (std::find(seen.begin(), seen.end(), what) != seen.end()) continue;
    message << " thread " << t << " " << what << ";";
    seen.push_back(what);
  }
  fail(message.str());
}

void run_block(int threads) {
  for (int t = 0; t < threads; t++) {
    Fiber& fiber = block.fibers[t];
    if (fiber.stack == nullptr) fiber.stack = new_stack();
    fiber.state = State::ready;
    fiber.copies.clear();
    fiber.groups = 0;
    fiber.fake_stack = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
  }
  block.warps.assign((threads + kLanes - 1) / kLanes, Warp{});
  block.epoch = 0;
  std::memset(block.shared_begin, 0xff, block.shared_size);
  if (detects_races) shared_bytes.assign(block.shared_size, Byte{});
  std::vector<int> order(threads);
  for (int t = 0; t < threads; t++) order[t] = t;
  for (int live = threads; live > 0;) {
    std::shuffle(order.begin(), order.end(), random_order);
    bool any = false;
    for (int thread : order) {
      if (block.fibers[thread].state != State::ready) continue;
      any = true;
      resume(thread);
      if (block.error) std::rethrow_exception(block.error);
      if (block.fibers[thread].state == State::returned) live--;
    }
    for (size_t warp = 0; warp < block.warps.size(); warp++) any |= release_warp(warp, threads);
    if (live > 0) any |= release_block(threads);
    if (!any) report_divergence(threads);
  }
}

void wait(State state, Place place) {
  Fiber& fiber = block.fibers[block.running];
  fiber.state = state;
  fiber.place = place;
  switch_to_scheduler(false);
}

void finish(Copy& copy) {
  if (detects_races) {
    mark_in_flight(copy.to, copy.bytes.size(), false);
    access(copy.to, copy.bytes.size(), true);
  }
  std::memcpy(copy.to, copy.bytes.data(), copy.bytes.size());
}

void check_aligned(const void* pointer, size_t size, const char* what) {
  if (reinterpret_cast<uintptr_t>(pointer) % size != 0) {
    fail(std::string(what) + ": an address that is no multiple of " + std::to_string(size));
  }
}

// One access of a kernel; of what the host does with its own stack nothing is said.
void aligned_access(const void* pointer, size_t size, bool write) {
  if (block.running < 0 || is_on_stack(reinterpret_cast<uintptr_t>(pointer))) return;
  check_aligned(pointer, size, "an access");
  access(pointer, size, write);
}

}  // namespace

Device& device() { return current_device; }
Options& options() { return current_options; }

void launch(dim3 grid, int threads, int64_t shared, const std::function<void()>& kernel) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (threads < 1 || threads > kMostThreads || threads % kLanes != 0) {
    fail("launch: a block of " + std::to_string(threads) + " threads");
  }
  if (shared < 0 || shared > current_device.shared_memory) {
    fail("launch: " + std::to_string(shared) + " bytes of shared memory a block");
  }
  if (grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) fail("launch: the grid's size");
  if (block.running >= 0) fail("launch: from a kernel");
  block.fibers.resize(kMostThreads);
  // Exactly as much as was asked for, so that AddressSanitizer sees overruns.
  std::free(block.shared_begin);
  void* memory = nullptr;
  if (posix_memalign(&memory, 16, static_cast<size_t>(shared)) != 0) fail("launch: no memory");
  block.shared_begin = static_cast<unsigned char*>(memory);
  block.shared_size = shared;
  block.kernel = &kernel;
  block.error = nullptr;
  blockDim = dim3(static_cast<unsigned>(threads));
  gridDim = grid;
  random_order.seed(current_options.seed);
  launches++;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  for (int64_t number = 0; number < blocks; number++) {
    block.number = number;
    blockIdx = {static_cast<unsigned>(number % grid.x),
                static_cast<unsigned>(number / grid.x % grid.y),
                static_cast<unsigned>(number / grid.x / grid.y)};
    try {
      run_block(threads);
    } catch (...) {
      block.running = -1;
      throw;
    }
  }
}

unsigned char* shared_memory() { return block.shared_begin; }

int lane() { return block.running % kLanes; }

void check_mask(unsigned mask) {
  if (mask != 0xffffffffu) fail("a warp's operation for some of its lanes is not emulated");
}

void block_barrier(Place place) { wait(State::at_block_barrier, place); }

void warp_barrier(Place place) {
  const int warp = block.running / kLanes;
  // Every lane counts, the first to go on for all: they have all arrived.
  const unsigned epoch = block.warps[warp].epoch;
  wait(State::at_warp_barrier, place);
  if (block.warps[warp].epoch == epoch) block.warps[warp].epoch++;
}

void warp_exchange(Place place, const void* mine, size_t size, void* all) {
  if (size > kExchange) fail("a warp exchanges too many bytes");
  Warp& warp = block.warps[block.running / kLanes];
  const int self = lane();
  const unsigned exchanges = warp.exchanges;
  auto& buffer = warp.buffer[exchanges % 2];
  std::memcpy(buffer[self], mine, size);
  wait(State::at_warp_barrier, place);
  if (warp.exchanges == exchanges) warp.exchanges++;
  for (int i = 0; i < kLanes; i++) {
    std::memcpy(static_cast<unsigned char*>(all) + i * size, buffer[i], size);
  }
}

void copy_async(void* shared, const void* global, size_t size, bool inside) {
  check_aligned(shared, size, "copy_async");
  const unsigned char* to = static_cast<unsigned char*>(shared);
  if (to < block.shared_begin || to + size > block.shared_begin + block.shared_size) {
    fail("copy_async: outside the block's shared memory");
  }
  Fiber& fiber = block.fibers[block.running];
  Copy copy{shared, std::vector<unsigned char>(size), fiber.groups};
  if (inside) {
    check_aligned(global, size, "copy_async");
    if (detects_races) access(global, size, false);
    std::memcpy(copy.bytes.data(), global, size);
  }
  if (detects_races) access(shared, size, true);
  std::memset(shared, 0xff, size);  // who reads before the copy is complete, reads NaN
  if (detects_races) mark_in_flight(shared, size, true);
  fiber.copies.push_back(std::move(copy));
}

void commit_copies() { block.fibers[block.running].groups++; }

void wait_copies(int pending) {
  Fiber& fiber = block.fibers[block.running];
  while (!fiber.copies.empty() && fiber.copies.front().group < fiber.groups - pending) {
    finish(fiber.copies.front());
    fiber.copies.pop_front();
  }
}

void load_matrices(uint32_t (&fragment)[4], const void* row) {
  struct Row {
    uint16_t values[8];
  };
  check_aligned(row, 16, "load_matrices");
  if (detects_races) access(row, 16, false);
  Row mine, all[kLanes];
  std::memcpy(&mine, row, 16);
  warp_exchange({__FILE__, __LINE__}, &mine, sizeof mine, all);
  const int self = lane();
  for (int m = 0; m < 4; m++) {
    const Row& values = all[8 * m + self / 4];
    const uint16_t low = values.values[self % 4 * 2], high = values.values[self % 4 * 2 + 1];
    fragment[m] = low | uint32_t{high} << 16;
  }
}

void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  void (*unpack)(uint32_t packed, float* pair)) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  Operands mine, all[kLanes];
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  warp_exchange({__FILE__, __LINE__}, &mine, sizeof mine, all);
  const int self = lane();
  for (int i = 0; i < 4; i++) {
    const int row = self / 4 + (i / 2) * 8, column = self % 4 * 2 + i % 2;
    double total = sum[i];
    for (int k = 0; k < 16; k++) {
      float left[2], right[2];
      // Lane 4 g + t holds rows g and g + 8 of a, columns 2 t, 2 t + 1 and those + 8.
      unpack(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2], left);
      unpack(all[column * 4 + k % 8 / 2].b[k / 8], right);
      total += static_cast<double>(left[k % 2]) * right[k % 2];
    }
    sum[i] = static_cast<float>(total);
  }
}

void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  Operands mine, all[kLanes];
  std::memcpy(mine.a, a, sizeof a);
  std::memcpy(mine.b, b, sizeof b);
  warp_exchange({__FILE__, __LINE__}, &mine, sizeof mine, all);
  const auto value = [](uint32_t bits) {
    bits &= 0xffffe000u;  // what the hardware looks at
    float result;
    std::memcpy(&result, &bits, 4);
    return static_cast<double>(result);
  };
  const int self = lane();
  for (int i = 0; i < 4; i++) {
    const int row = self / 4 + (i / 2) * 8, column = self % 4 * 2 + i % 2;
    double total = sum[i];
    for (int k = 0; k < 8; k++) {
      total += value(all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2]) *
               value(all[column * 4 + k % 4].b[k / 4]);
    }
    sum[i] = static_cast<float>(total);
  }
}

// ---- Numbers

namespace {
uint32_t bits_of(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
float float_of(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
}  // namespace

uint16_t to_bf16(float value) {
  const uint32_t bits = bits_of(value);
  if (std::isnan(value)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float from_bf16(uint16_t bits) { return float_of(uint32_t{bits} << 16); }

uint16_t to_f16(float value) {
  const uint16_t sign = static_cast<uint16_t>(bits_of(value) >> 16 & 0x8000);
  const float size = std::fabs(value);
  if (std::isnan(value)) return 0x7fff;
  if (size >= 65520.0f) return sign | 0x7c00;
  if (size < 6.103515625e-5f) {  // 2^-14: denormal, in steps of 2^-24
    return sign | static_cast<uint16_t>(std::nearbyint(size * 16777216.0f));
  }
  const uint32_t bits = bits_of(size);
  const uint32_t rounded = bits + 0xfff + (bits >> 13 & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

float from_f16(uint16_t bits) {
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent == 31) {
    return fraction ? std::nanf("") : sign * HUGE_VALF;
  }
  if (exponent == 0) return sign * static_cast<float>(fraction) / 16777216.0f;
  return sign * float_of(static_cast<uint32_t>(exponent + 112) << 23 |
                         static_cast<uint32_t>(fraction) << 13);
}

uint32_t to_tf32(float value) {  // to nearest, halves away from zero
  return std::isnan(value) ? 0x7fffffffu : (bits_of(value) + 0x1000) & 0xffffe000u;
}

}  // namespace effkernels::emulation

// ---- What -fsanitize=thread makes kernels call. ThreadSanitizer itself is not linked.

extern "C" {
#define HOOK(NAME, SIZE, WRITE) \
  void NAME(void* address) { effkernels::emulation::aligned_access(address, SIZE, WRITE); }
HOOK(__tsan_read1, 1, false)
HOOK(__tsan_read2, 2, false)
HOOK(__tsan_read4, 4, false)
HOOK(__tsan_read8, 8, false)
HOOK(__tsan_read16, 16, false)
HOOK(__tsan_write1, 1, true)
HOOK(__tsan_write2, 2, true)
HOOK(__tsan_write4, 4, true)
HOOK(__tsan_write8, 8, true)
HOOK(__tsan_write16, 16, true)
void __tsan_read_range(void* address, size_t size) {
  effkernels::emulation::access(address, size, false);
}
void __tsan_write_range(void* address, size_t size) {
  effkernels::emulation::access(address, size, true);
}
unsigned char __tsan_atomic8_load(const volatile unsigned char* address, int) { return *address; }
void __tsan_init() { effkernels::emulation::detects_races = true; }
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
