#pragma once

#include <cstdint>

#include "common/cuda_rows.h"
#include "common/types.h"

namespace effkernels {

// A BatchNorm that is not folded into a scale and a shift.
struct NormalizationCuda {
  Values mean, var;     // [channels]
  Values weight, bias;  // [channels] or null
  double eps;
};

struct BatchNormActCuda {
  DType dtype;           // of output, input and residual
  void* output;          // [rows, channels]
  const void* input;     // [rows, channels]
  const void* residual;  // [rows, channels] or null
  int64_t rows, channels;
  NormalizationCuda normalization;  // its mean and var are written first, in training
  float* mean;                      // [channels]: the batch's statistics, in training
  float* var;                       // biased
  float* scratch;                   // batch_norm_act_scratch floats, in training
  Activation activation;
  void* stream;
};

struct BatchNormActBackwardCuda {
  DType dtype;              // of the tensors
  void* input_gradient;     // [rows, channels] or null
  void* residual_gradient;  // [rows, channels] or null
  const void* upstream;     // [rows, channels]
  const void* input;        // [rows, channels]
  const void* residual;     // [rows, channels] or null
  int64_t rows, channels;
  NormalizationCuda normalization;
  bool training;                           // mean and var are the input's own
  Written weight_gradient, bias_gradient;  // [channels] or null
  Written mean_gradient, var_gradient;     // [channels] or null; in inference
  const float* mean_upstream;              // [channels] or null; in training
  const float* var_upstream;
  float* scratch;  // batch_norm_act_backward_scratch floats
  Activation activation;
  void* stream;
};

// Floats of global memory that partial results take.
int64_t batch_norm_act_scratch(DType dtype, int64_t rows, int64_t channels);
int64_t batch_norm_act_backward_scratch(DType dtype, int64_t rows, int64_t channels);

void batch_norm_act_cuda(const BatchNormActCuda& args, bool training);
void batch_norm_act_backward_cuda(const BatchNormActBackwardCuda& args);

}  // namespace effkernels
