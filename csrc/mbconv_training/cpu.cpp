// mbconv_training: the inverted-residual block with BatchNorm's own statistics, and its gradients.
//
//   z1 = expand * x                              product; its moments from the cache
//   z2 = depthwise (*) act(norm1(z1))            a ring of rows; moments from the cache
//   gate from mean(act(norm2(z2)))               a pass over z2
//   z3 = project * (gate . act(norm2(z2)))       product, its A made in scratch; moments
//   y  = keep * norm3(z3) + x                    a pass over the small tensors
//
// and backward, u_i the gradient for what comes after norm_i and its activation:
//
//   norm3's sums                                 a pass over dy and z3
//   dproject, u2, sums of u2 for gate and norm2  products; dz3 and the gated activation in scratch
//   ddepthwise, u1 act', norm1's sums            a ring of rows of dz2, spread out by the stride
//   dexpand, dx                                  products; dz1 in scratch
//
// Layout NHWC. Kept are x, z1, z2, z3 and vectors; of tensors of the expanded size (6 times the
// input) the forward pass writes two and reads three, the backward pass writes two and reads six.
// PyTorch's forward pass alone writes seven, reads nine and keeps six. Operations: 3 times the
// block's multiply-adds (twice for the depthwise gradient where the stride is 2), and 8
// evaluations of the activation instead of 4 for those of the expanded size.
//
// Ladder, a training step of torchvision's EfficientNet-B0 at 224 pixels, batch 16, two cores of a
// Xeon (avx512), against eager in the same run:
//   stage by stage: BatchNorm with activation and depthwise native     0.595 s (eager 0.996)
//   this op for all 16 blocks                                          0.388 s (eager 1.038)
// Of that step, by PyTorch's profiler: product_backward 31 % (it holds three products and the
// recomputed activation), depthwise_backward 21 %, product 15 %, depthwise 9 %, pool 3 %.
// Then, ms a step of all calls, before and after in turns on a quiet machine:
//   pool: 16 rows side by side, fetched ahead, not one vector down all rows     13.2 ->  5.6
//   product: two tiles of rows get all their channels, then the next            55.5 -> 49.0
//   product_backward: the same, and partial weight gradients added by vectors  116.4 -> 110
//   depthwise, _backward: the next row fetched while one is computed    32, 72 -> 24, 54-61
//   product_backward: rows fetched 256, 1024, 4096, 16384 values ahead   109 -> 104, 103, 100, 103
// Tried without effect: four vectors side by side in block_moments, for its chains' latency.
#include "mbconv_training/cpu_depthwise.h"
#include "mbconv_training/cpu_product.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

void mbconv_training_product(const TrainingProductArgs& args) {
  args.dtype == DType::f32 ? product<float>(args) : product<bf16>(args);
}

void mbconv_training_depthwise(const TrainingDepthwiseArgs& args) {
  args.dtype == DType::f32 ? depthwise<float>(args) : depthwise<bf16>(args);
}

void mbconv_training_pool(const TrainingPoolArgs& args) {
  args.dtype == DType::f32 ? pool<float>(args) : pool<bf16>(args);
}

void mbconv_training_finish(const TrainingFinishArgs& args) {
  args.dtype == DType::f32 ? finish<float>(args) : finish<bf16>(args);
}

void mbconv_training_norm_backward(const TrainingNormBackwardArgs& args) {
  args.dtype == DType::f32 ? norm_backward<float>(args) : norm_backward<bf16>(args);
}

void mbconv_training_product_backward(const TrainingProductBackwardArgs& args) {
  args.dtype == DType::f32 ? product_backward<float>(args) : product_backward<bf16>(args);
}

void mbconv_training_depthwise_backward(const TrainingDepthwiseBackwardArgs& args) {
  args.dtype == DType::f32 ? depthwise_backward<float>(args) : depthwise_backward<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
