// A GPU on the host, for tests: what cuda.h and the kernels need of CUDA when no nvcc compiles
// them.
//
// A launch runs its blocks one after the other and each block's threads as fibers, which give way
// only where they wait for each other: at __syncthreads, __syncwarp, shuffles and the operations of
// a whole warp. Between two such points threads run in an order drawn by the seed. What cannot
// happen on a GPU, or must not be relied on, is an error with a sentence: threads of a block that
// wait at different barriers, or for one that has returned; lanes missing at a shuffle; a
// misaligned vector; more threads or shared memory than the device has. Shared memory begins as
// NaN. tests/cuda/emulation.cpp is the implementation, and finds races and reads of what nobody
// wrote when the kernels are compiled with -fsanitize=thread, whose hooks it takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct __attribute__((aligned(8), may_alias)) float2 {
  float x, y;
};
struct __attribute__((aligned(16), may_alias)) uint4 {
  unsigned x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

// Of the thread that runs now.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace effkernels::emulation {

// Where a thread waits: barriers of two places are two barriers.
struct Place {
  const char* file;
  int line;
};

struct Device {
  int capability = 90;
  int processors = 132;
  int64_t shared_memory = 227 * 1024;
  int64_t l2 = 50 << 20;
};
Device& device();

// How the next launches run.
struct Options {
  uint64_t seed = 0;  // of the order of threads
};
Options& options();

void launch(dim3 grid, int threads, int64_t shared, const std::function<void()>& kernel);

unsigned char* shared_memory();
void block_barrier(Place place);
void warp_barrier(Place place);
// Every lane gives `size` bytes and gets those of all 32, in the order of the lanes.
void warp_exchange(Place place, const void* mine, size_t size, void* all);
int lane();

void copy_async(void* shared, const void* global, size_t size, bool inside);
void commit_copies();
void wait_copies(int pending);

void load_matrices(uint32_t (&fragment)[4], const void* row);
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  void (*unpack)(uint32_t packed, float* pair));
void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

uint16_t to_bf16(float value);
float from_bf16(uint16_t bits);
uint16_t to_f16(float value);
float from_f16(uint16_t bits);
uint32_t to_tf32(float value);

// Whether all lanes are asked for; others are not supported.
void check_mask(unsigned mask);

template <class T>
T shuffle(Place place, unsigned mask, T value, int from) {
  check_mask(mask);
  T all[32];
  warp_exchange(place, &value, sizeof(T), all);
  return all[from & 31];
}

}  // namespace effkernels::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  effkernels::emulation::block_barrier({file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  effkernels::emulation::check_mask(mask);
  effkernels::emulation::warp_barrier({file, line});
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  return effkernels::emulation::shuffle({file, line}, mask, value,
                                        effkernels::emulation::lane() ^ distance);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  return effkernels::emulation::shuffle({file, line}, mask, value, from);
}

inline float rsqrtf(float x) { return 1.0f / __builtin_sqrtf(x); }
