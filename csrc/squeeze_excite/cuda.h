#pragma once

#include <cstdint>

#include "common/rows.h"
#include "common/types.h"

namespace effkernels {

struct GateWeights {
  DType dtype;  // of both matrices and of the gate
  int64_t channels, reduced;
  const void* reduce_weight;  // [reduced, channels]
  Values reduce_bias;         // [reduced] or null
  const void* expand_weight;  // [channels, reduced]
  Values expand_bias;         // [channels] or null
  Activation activation, gate_activation;
};

struct SqueezeExciteGateCuda {
  GateWeights weights;
  void* gate;   // [images, channels]
  Values mean;  // [images, blocks, channels]: partial sums; times `factor` they are the mean
  int64_t images, blocks;
  double factor;
  void* stream;
};

// Whether this device's blocks have shared memory enough for the vectors of an image.
bool squeeze_excite_fits(int64_t channels, int64_t reduced);

void squeeze_excite_gate_cuda(const SqueezeExciteGateCuda& args);

}  // namespace effkernels
