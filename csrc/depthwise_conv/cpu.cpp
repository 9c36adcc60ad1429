// depthwise_conv: output[n, y, x, c] = epilogue(sum over taps of weight[tap, c] * input[...])
//
// Layout NHWC. Moves each input row kernel_h times through L1/L2 and each output once; 2 * k * k
// operations a value: bound by L1 loads (one per fma). Rows of the output are independent tasks.
// The mean comes from per-row sums, added in the order of the rows, so that it does not depend on
// how many threads ran.
#include "common/reduce.h"
#include "common/scratch.h"
#include "common/window.h"
#include "depthwise_conv/depthwise_conv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

template <class T>
void run(const DepthwiseConvArgs& args) {
  const Images& in = args.in;
  const int64_t out_row = args.out_width * in.channels;
  const int64_t weight_stride = round_up(in.channels, kPanel);
  const int64_t tasks = in.count * args.out_height;
  float* sums = nullptr;
  if (args.mean != nullptr) {
    sums = scratch(ScratchUse::kBlock, static_cast<size_t>(tasks * in.channels));
  }
  parallel_for(args.parallel, tasks, [&](int64_t begin, int64_t end) {
    const size_t taps = static_cast<size_t>(args.geometry.kernel_h);
    const T** rows = static_cast<const T**>(__builtin_alloca(taps * sizeof(const T*)));
    for (int64_t task = begin; task < end; task++) {
      float* sum = sums == nullptr ? nullptr : sums + task * in.channels;
      for (int64_t c = 0; sum != nullptr && c < in.channels; c++) sum[c] = 0.0f;
      window_row(static_cast<const T*>(args.input) + task / args.out_height * in.size(), in,
                 args.geometry, task % args.out_height, args.out_width, args.weight, weight_stride,
                 args.epilogue, static_cast<T*>(args.output) + task * out_row, rows, sum);
    }
  });
  if (args.mean == nullptr) return;
  for (int64_t n = 0; n < in.count; n++) {
    reduce_rows(sums + n * args.out_height * in.channels, args.out_height, in.channels,
                1.0f / static_cast<float>(args.out_height * args.out_width),
                static_cast<T*>(args.mean) + n * in.channels);
  }
}

}  // namespace

void depthwise_conv(const DepthwiseConvArgs& args) {
  args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
