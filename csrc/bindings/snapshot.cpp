// What effkernels/modules/snapshot.py asks of a network's Python objects before a planned call.
//
// Called by ctypes with the interpreter's lock held. The interpreter's own functions come as
// arguments: nothing here is linked against Python, so one library serves all its versions.
//
// The objects are spread over the heap, and the kernels have swept the caches since the last call.
// Loops in Python wait for one cache line after the other; here many are on their way at a time.
#include <cstddef>
#include <cstdint>

#define EFFKERNELS_PYTHON extern "C" __attribute__((visibility("default")))

namespace {

constexpr int64_t kLine = 64;   // bytes
constexpr int64_t kAhead = 32;  // entries; a lookup takes 10 ns, a line from the L3 some 50
// The word of a CPython dict that says where its keys are, and how much of them a lookup reads
// first. Another place in another version: a line that is of no use is fetched, nothing else.
constexpr int64_t kKeysAt = 4, kKeysBytes = 192;

void prefetch(const char* address, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += kLine) __builtin_prefetch(address + at);
}

}  // namespace

// Whether every dict has its value at its name. `entries`: count times dict, name, value; no value
// where the name must not be there.
EFFKERNELS_PYTHON int effkernels_entries_hold(void* (*get)(void* dict, void* name),
                                              void* const* entries, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(entries[3 * (i + kAhead)]);
    if (i + kAhead / 2 < count) {
      prefetch(static_cast<char* const*>(entries[3 * (i + kAhead / 2)])[kKeysAt], kKeysBytes);
    }
    void* const* entry = entries + 3 * i;
    if (get(entry[0], entry[1]) != entry[2]) return 0;
  }
  return 1;
}

// Whether every dict is as long as it was.
EFFKERNELS_PYTHON int effkernels_sizes_hold(ptrdiff_t (*size)(void* dict), void* const* dicts,
                                            const int64_t* sizes, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < count) __builtin_prefetch(dicts[i + kAhead]);
    if (size(dicts[i]) != sizes[i]) return 0;
  }
  return 1;
}

// Asks for the first bytes of what the caller will read next.
EFFKERNELS_PYTHON void effkernels_prefetch(const char* const* addresses, int64_t count,
                                           int64_t bytes) {
  for (int64_t i = 0; i < count; ++i) prefetch(addresses[i], bytes);
}
