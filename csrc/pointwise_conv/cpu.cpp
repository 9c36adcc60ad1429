// pointwise_conv: output[n, p, k] = epilogue(sum over c of weight[k, c] * gate[n, c] * input[n, p,
// c])
//
// Layout NHWC: the pixels p are the rows of a matrix product (common/gemm.h). Moves input and
// output once and every weight panel once per chunk of rows; 2 * channels operations a value.
// A gate or bf16 input goes through a chunk of float32 rows in L2, once per chunk and not per
// panel: 1 / out_channels of the product's work.
#include "common/gemm.h"
#include "common/reduce.h"
#include "pointwise_conv/pointwise_conv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

template <class T>
void run(const PointwiseConvArgs& args) {
  GemmShape shape{args.in.count, args.in.pixels(), args.in.channels, args.out_channels, false};
  if (args.gate == nullptr && args.mean == nullptr) {  // nothing asks where an image ends
    shape.rows *= shape.images;
    shape.images = 1;
  }
  const int64_t chunks = ceil_div(shape.rows, chunk_rows(shape.depth));
  float* sums = nullptr;
  if (args.mean != nullptr) {
    sums = scratch(ScratchUse::kBlock, static_cast<size_t>(shape.images * chunks * shape.channels));
  }
  pointwise_gemm(shape, static_cast<const T*>(args.input), args.gate, args.weight, args.epilogue,
                 static_cast<T*>(args.output), sums, args.parallel);
  if (args.mean == nullptr) return;
  for (int64_t n = 0; n < shape.images; n++) {
    reduce_rows(sums + n * chunks * shape.channels, chunks, shape.channels,
                1.0f / static_cast<float>(shape.rows),
                static_cast<T*>(args.mean) + n * shape.channels);
  }
}

}  // namespace

void pointwise_conv(const PointwiseConvArgs& args) {
  args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
