// A network as one call: a list of kernel calls over values that live in one arena.
//
// Between two kernels of a chain of ops lie two calls through Python and PyTorch's dispatcher,
// about 10 us while their code is in the caches and three times that after a kernel swept it out:
// a tenth of EfficientNet-B0's time. A program is built once by effkernels/program.py.
#pragma once

#include <cstdint>
#include <vector>

#include "bindings/arguments.h"

namespace effkernels {

// Builds a program; returns its handle.
//   values   4 numbers each: height, width, channels and place. A place >= 0 is an offset into the
//            arena, in values per image; -1 - i is the i-th tensor that a run is given.
//   steps    kStepNumbers each, see program.cpp.
//   weights  packed as for the ops; steps refer to them by index.
//   bf16     the dtype of the values, else float32.
int64_t program_create(std::vector<int64_t> values, std::vector<int64_t> steps,
                       std::vector<Tensor> weights, bool bf16);

// Runs it on dense NHWC tensors, the program's inputs and outputs in the order of their places.
void program_run(int64_t handle, std::vector<Tensor> tensors);

void program_free(int64_t handle);

}  // namespace effkernels
