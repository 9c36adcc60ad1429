// Working memory that outlives a call, one buffer per thread and use.
#pragma once

#include <cstddef>

namespace effkernels {

// These uses can be alive at once on one thread: the values of a program (kProgram), an op's own
// buffers (kBlock), the rows of an expanded image inside it (kRing), and the rows that a matrix
// product prepares (kPanelRows).
enum class ScratchUse { kProgram, kBlock, kRing, kPanelRows };
constexpr int kScratchUses = 4;

// At least `floats` uninitialised floats, 64-byte aligned, valid until the same thread asks for
// the same use again.
float* scratch(ScratchUse use, size_t floats);

}  // namespace effkernels
