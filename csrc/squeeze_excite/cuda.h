#pragma once

#include <cstdint>

#include "common/cuda_rows.h"
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

struct SqueezeExciteGateBackwardCuda {
  GateWeights weights;
  void* gate;       // [images, channels], once more, or null
  Values mean;      // [images, blocks, channels]: partial sums; times `factor` they are the mean
  Values upstream;  // [images, blocks, channels]: partial sums of the gradient for the gate
  int64_t images, blocks;
  double factor;
  Written mean_gradient;           // [images, channels] or null: for the mean itself
  Written reduce_weight_gradient;  // like the parameters, or null
  Written reduce_bias_gradient;
  Written expand_weight_gradient;
  Written expand_bias_gradient;
  float* scratch;  // squeeze_excite_gate_scratch floats, aligned to 16 bytes
  void* stream;
};

// Sums over the pixels of input and of upstream * input.
struct SqueezeExcitePoolCuda {
  DType dtype;
  float* sums;           // [images, blocks, channels], squeeze_excite_pool_blocks of them
  float* products;       // the same, or null
  const void* input;     // [images, rows, channels]
  const void* upstream;  // [images, rows, channels]; null without products
  int64_t images, rows, channels;
  void* stream;
};

// output = gate * input + factor * offset
struct SqueezeExciteScaleCuda {
  DType dtype;
  void* output;         // [images, rows, channels]
  const void* input;    // [images, rows, channels]
  const void* gate;     // [images, channels]
  const float* offset;  // [images, channels] or null
  double factor;
  int64_t images, rows, channels;
  void* stream;
};

// Whether this device's blocks have shared memory enough for the vectors of an image.
bool squeeze_excite_fits(int64_t channels, int64_t reduced);

int64_t squeeze_excite_pool_blocks(DType dtype, int64_t images, int64_t rows, int64_t channels,
                                   bool products);
int64_t squeeze_excite_gate_scratch(int64_t images, int64_t channels, int64_t reduced);

void squeeze_excite_pool_cuda(const SqueezeExcitePoolCuda& args);
void squeeze_excite_scale_cuda(const SqueezeExciteScaleCuda& args);
void squeeze_excite_gate_cuda(const SqueezeExciteGateCuda& args);
void squeeze_excite_gate_backward_cuda(const SqueezeExciteGateBackwardCuda& args);

}  // namespace effkernels
