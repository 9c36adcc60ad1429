#include "common/scratch.h"

#include <cstdlib>
#include <new>

namespace effkernels {
namespace {

// Larger buffers are given back when a smaller one is asked for: a thread that once ran a
// 600x600 image should not keep its memory for ever.
constexpr size_t kKeepFloats = size_t{16} << 20;

struct Buffer {
  float* data = nullptr;
  size_t size = 0;

  float* reserve(size_t floats) {
    if (floats > size || (size > kKeepFloats && floats < size / 2)) {
      std::free(data);
      data = nullptr;
      size = 0;
      const size_t bytes = (floats * sizeof(float) + 63) / 64 * 64;
      data = static_cast<float*>(std::aligned_alloc(64, bytes == 0 ? 64 : bytes));
      if (data == nullptr) throw std::bad_alloc();
      size = floats;
    }
    return data;
  }

  ~Buffer() { std::free(data); }
};

}  // namespace

float* scratch(ScratchUse use, size_t floats) {
  thread_local Buffer buffers[kScratchUses];
  return buffers[static_cast<int>(use)].reserve(floats);
}

}  // namespace effkernels
