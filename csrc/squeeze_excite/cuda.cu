// mean[n, c]   = sum over pixels of input[n, c] / (H * W)
// gate[n]      = gate_activation(expand * activation(reduce * mean[n] + reduce_bias) + expand_bias)
// output[n, c] = gate[n, c] * input[n, c]
//
// Tensors are [images, rows, channels], rows are pixels: NHWC. Three launches: partial sums, the
// gate (cuda_gate.h), the product. The gradient takes four: sums of input and of upstream * input
// in one reading, two for the gate's (cuda_gate_gradient.h), and input_gradient = gate * upstream +
// mean_gradient / (H * W).
//
// Moves: forward 3, backward 4 tensors' bytes. B0's largest at batch 256 (96 channels, 56 x 56,
// bfloat16: 154 MB) on an H100 at 3.0 TB/s: 0.15 and 0.21 ms. MBConv does without all of that: its
// depthwise convolution gives the partial sums, and its projection multiplies with the gate.
//
// A thread has one 16-byte vector of channels in every row it sees (common/cuda_rows.h) and 4 loads
// under way: at 32 warps 64 KB a processor, where 3.0 TB/s at 600 ns need 14. As compiled for
// sm_90, bfloat16: sums 48 and 56 registers, product 64. No GPU has run this.
//
// promise: pool_kernel<.*> threads 256, shared 16384, warps 32, loads 16
// promise: scale_kernel<.*> threads 256, shared 0, warps 32, loads 16, stores 16
#include "common/cuda.h"
#include "common/cuda_rows.h"
#include "squeeze_excite/cuda.h"
#include "squeeze_excite/cuda_gate.h"
#include "squeeze_excite/cuda_gate_gradient.h"

namespace effkernels {
namespace {

constexpr int kThreads = 256;
constexpr int kWidest = 32;  // vectors of a row that a block takes: 512 bytes
constexpr int kUnroll = 4;   // accesses under way per thread

// ---- Sums over the pixels

template <class T>
struct Pool {
  float* sums;      // [images, blocks, channels]: of input
  float* products;  // the same, of upstream * input
  const T* input;   // [images, rows, channels]
  const T* upstream;
  int64_t rows;
  int block_rows, blocks;
  Tiles tiles;
  bool aligned;
};

template <class T, bool kProducts>
__global__ void __launch_bounds__(kThreads, 4) pool_kernel(Pool<T> args) {
  constexpr int kV = kVector<T>, kRows = kProducts ? kUnroll / 2 : kUnroll;
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const int rest = static_cast<int>(blockIdx.x) / tiles.chunks;
  const int block = rest % args.blocks, image = rest / args.blocks;
  const Lane lane = lane_of<T>(tiles, chunk);
  const int64_t first = int64_t{block} * args.block_rows, after = args.rows - first;
  const int rows = after < args.block_rows ? static_cast<int>(after) : args.block_rows;
  int64_t at = (image * args.rows + first + lane.row) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  float sum[kV] = {}, product[kV] = {};
  if (lane.count > 0) {
    for (int row = lane.row; row < rows; row += kRows * tiles.lanes) {
      Words words[kRows], upstream[kRows];
      with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
        for (int u = 0; u < kRows; u++) {  // zero past the last row
          const int count = row + u * tiles.lanes < rows ? lane.count : 0;
          words[u] = load_first(args.input + at + u * stride, count, aligned);
          if (kProducts) upstream[u] = load_first(args.upstream + at + u * stride, count, aligned);
        }
      });
      at += kRows * stride;
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        float x[kV], t[kV];
        unpack<T>(words[u], x);
        if (kProducts) unpack<T>(upstream[u], t);
#pragma unroll
        for (int i = 0; i < kV; i++) {
          sum[i] += x[i];
          if (kProducts) product[i] += x[i] * t[i];
        }
      }
    }
  }

  const int columns = tiles.width * kV, thread = static_cast<int>(threadIdx.x);
  float* sums = reinterpret_cast<float*>(dynamic_shared());
  float* products = sums + tiles.lanes * columns;
  if (lane.row < tiles.lanes) {
    store_floats<T>(sums + lane.row * columns + lane.v * kV, sum);
    if (kProducts) store_floats<T>(products + lane.row * columns + lane.v * kV, product);
  }
  merge_lanes<kThreads>(sums, tiles.lanes, columns);
  if (kProducts) merge_lanes<kThreads>(products, tiles.lanes, columns);
  const int c = chunk * columns + thread;
  if (thread < columns && c < tiles.channels) {
    const int64_t to = int64_t{rest} * tiles.channels + c;
    args.sums[to] = sums[thread];
    if (kProducts) args.products[to] = products[thread];
  }
}

// ---- The product with the gate

template <class T>
struct Scale {
  T* output;            // [images, rows, channels]
  const T* input;       // [images, rows, channels]
  const T* gate;        // [images, channels]
  const float* offset;  // [images, channels], or null
  float factor;         // of the offset
  int64_t rows;
  int steps, blocks;
  Tiles tiles;
  bool aligned;
};

// output = gate * input + factor * offset
template <class T>
__global__ void __launch_bounds__(kThreads, 4) scale_kernel(Scale<T> args) {
  constexpr int kV = kVector<T>;
  const Tiles& tiles = args.tiles;
  const int chunk = static_cast<int>(blockIdx.x) % tiles.chunks;
  const int rest = static_cast<int>(blockIdx.x) / tiles.chunks;
  const int block = rest % args.blocks, image = rest / args.blocks;
  const Lane lane = lane_of<T>(tiles, chunk);
  if (lane.count == 0) return;
  const int most = args.steps * kUnroll * tiles.lanes;
  const int64_t first = int64_t{block} * most + lane.row, after = args.rows - first;
  const int left = after < most ? static_cast<int>(after) : most;
  int64_t at = (image * args.rows + first) * tiles.channels + lane.c;
  const int stride = tiles.lanes * tiles.channels;

  Words words[kUnroll];
  const auto fetch = [&](int done) {
    with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        const int count = done + u * tiles.lanes < left ? lane.count : 0;
        words[u] = load_first(args.input + at + u * stride, count, aligned);
      }
    });
  };
  fetch(0);
  const int64_t vector = int64_t{image} * tiles.channels + lane.c;
  float gate[kV], offset[kV];
  unpack<T>(load_first(args.gate + vector, lane.count, args.aligned), gate);
#pragma unroll
  for (int i = 0; i < kV; i++) {
    offset[i] = args.offset && i < lane.count ? args.factor * args.offset[vector + i] : 0.0f;
  }
  for (int done = 0; done < left;) {
    with_alignment(args.aligned, [&](auto aligned) {
#pragma unroll
      for (int u = 0; u < kUnroll; u++) {
        float values[kV];
        unpack<T>(words[u], values);
#pragma unroll
        for (int i = 0; i < kV; i++) values[i] = values[i] * gate[i] + offset[i];
        const int count = done + u * tiles.lanes < left ? lane.count : 0;
        store_first(args.output + at + u * stride, count, aligned, pack<T>(values));
      }
    });
    done += kUnroll * tiles.lanes;
    at += kUnroll * stride;
    if (done < left) fetch(done);
  }
}

// ---- Launches

unsigned blocks_of(int64_t blocks) {
  if (blocks > 0x7fffffff) throw std::invalid_argument("squeeze_excite: input is too large");
  return static_cast<unsigned>(blocks);
}

Partials partials_of(const Values& sums, int64_t blocks, double factor, int64_t channels,
                     int64_t items) {
  return {sums, static_cast<float>(factor), static_cast<int>(blocks),
          static_cast<int>(max_of(1, min_of(blocks, kGateThreads / items))),
          sums.is_float && channels % 4 == 0 && is_aligned(sums.data)};
}

template <class T>
Gate<T> gate_of(const GateWeights& weights, const Values& mean, int64_t images, int64_t blocks,
                double factor, int images_per_block) {
  constexpr int kV = kVector<T>;
  Gate<T> args;
  args.gate = nullptr;
  args.reduce_weight = static_cast<const T*>(weights.reduce_weight);
  args.reduce_bias = weights.reduce_bias;
  args.expand_weight = static_cast<const T*>(weights.expand_weight);
  args.expand_bias = weights.expand_bias;
  args.images = static_cast<int>(images);
  args.channels = static_cast<int>(weights.channels);
  args.reduced = static_cast<int>(weights.reduced);
  args.activation = weights.activation;
  args.gate_activation = weights.gate_activation;
  args.reduce_aligned = weights.channels % kV == 0 && is_aligned(weights.reduce_weight);
  args.expand_aligned = weights.reduced % kV == 0 && is_aligned(weights.expand_weight);
  const int64_t items = int64_t{images_per_block} * args.padded() / 4;
  args.mean = partials_of(mean, blocks, factor, weights.channels, items);
  const int64_t groups = ceil_div(weights.reduced, kRows);
  const int64_t steps = ceil_div(args.padded() / kV, kWarp);
  args.splits = static_cast<int>(max_of(1, min_of(kGateWarps / groups, steps)));
  args.lanes = 4;
  while (args.lanes < kWarp && args.lanes * kV < args.reduced) args.lanes *= 2;
  args.slices = 1;
  args.slice = args.channels;
  return args;
}

// Bytes of shared memory: vectors, and what threads add up.
template <class T>
int64_t shared_bytes(const Gate<T>& args, int images) {
  const int64_t sums = args.mean.parts > 1 ? int64_t{args.mean.parts} * images * args.padded() : 0;
  const int64_t products = int64_t{args.splits} * images * args.reduced;
  const int64_t vectors = images * (int64_t{args.padded()} + args.padded_reduced());
  return 4 * (vectors + max_of(sums, products));
}

template <class T>
int64_t gradient_bytes(const HiddenGradient<T>& args) {
  const Gate<T>& gate = args.gate;
  const int64_t parts = max_of(gate.mean.parts, args.upstream.parts);
  const int64_t sums = parts > 1 ? parts * kGradientImages * gate.padded() : 0;
  const int64_t products = int64_t{gate.splits} * kGradientImages * gate.reduced;
  const int64_t warps = int64_t{kGateWarps} * kGradientImages * gate.lanes * kVector<T>;
  const int64_t vectors = int64_t{2} * kGradientImages * (gate.padded() + gate.padded_reduced());
  return 4 * (vectors + max_of(sums, max_of(products, warps)));
}

template <class T, int kImages>
void run_gate(const SqueezeExciteGateCuda& args) {
  Gate<T> gate =
      gate_of<T>(args.weights, args.mean, args.images, args.blocks, args.factor, kImages);
  gate.gate = static_cast<T*>(args.gate);
  // Slices of the channels while processors are left; 64 channels keep four warps busy.
  const int64_t groups = ceil_div(args.images, kImages);
  const int64_t wanted = max_of(1, device_properties().processors / groups);
  const int64_t slice = max_of(64, round_up(ceil_div(gate.channels, wanted), 16));
  gate.slice = static_cast<int>(min_of(slice, gate.channels));
  gate.slices = static_cast<int>(ceil_div(gate.channels, gate.slice));
  launch(gate_kernel<T, kImages>, dim3(blocks_of(groups * gate.slices)), kGateThreads,
         shared_bytes(gate, kImages), args.stream, gate);
}

constexpr int kManyImages = 4;  // of a block, where there are enough

struct Shares {
  Tiles tiles;
  int block_rows, blocks;  // of an image
};

template <class T>
Shares shares_of_images(int64_t images, int64_t rows, int64_t channels, int unroll) {
  const Tiles tiles = tiles_of<T>(channels, kThreads, kWidest);
  const int64_t step = int64_t{unroll} * tiles.lanes;
  // One block an image if that gives every processor its four; else a few that share the pixels.
  const int64_t wanted =
      ceil_div(int64_t{4} * device_properties().processors, max_of(1, images * tiles.chunks));
  const int64_t block_rows = max_of(1, ceil_div(ceil_div(rows, wanted), step)) * step;
  if (block_rows > 1 << 30) throw std::invalid_argument("squeeze_excite: input is too large");
  return {tiles, static_cast<int>(block_rows),
          static_cast<int>(max_of(1, ceil_div(rows, block_rows)))};
}

int64_t stride_of(int64_t size) { return round_up(size, 4); }

template <class T>
void run_gate_backward(const SqueezeExciteGateBackwardCuda& args) {
  const GateWeights& weights = args.weights;
  const int64_t images = args.images, channels = weights.channels, reduced = weights.reduced;
  HiddenGradient<T> problem;
  problem.gate = gate_of<T>(weights, args.mean, images, args.blocks, args.factor, kGradientImages);
  problem.gate.gate = static_cast<T*>(args.gate);
  problem.upstream = partials_of(args.upstream, args.blocks, 1.0, channels,
                                 int64_t{kGradientImages} * problem.gate.padded() / 4);
  const int64_t stride = stride_of(reduced), image_stride = stride_of(images);
  problem.mean = args.scratch;
  problem.expanded = problem.mean + round_up(images * channels, 4);
  problem.hidden = problem.expanded + round_up(images * channels, 4);
  problem.gradient = problem.hidden + images * stride;
  problem.transposed = problem.gradient + images * stride;
  problem.stride = static_cast<int>(stride);
  problem.image_stride = static_cast<int>(image_stride);
  launch(hidden_gradient_kernel<T>, dim3(blocks_of(ceil_div(images, kGradientImages))),
         kGateThreads, gradient_bytes(problem), args.stream, problem);

  const int n = static_cast<int>(images), c = static_cast<int>(channels);
  const int r = static_cast<int>(reduced);
  Product reduce, expand, mean;
  reduce.a = problem.gradient;
  reduce.b = {problem.mean, true};
  reduce.a_stride = problem.stride;
  reduce.b_stride = c;
  reduce.k = n;
  reduce.i = r;
  reduce.j = c;
  reduce.output = args.reduce_weight_gradient;
  reduce.bias = args.reduce_bias_gradient;
  expand.a = problem.expanded;
  expand.b = {problem.hidden, true};
  expand.a_stride = c;
  expand.b_stride = problem.stride;
  expand.k = n;
  expand.i = c;
  expand.j = r;
  expand.output = args.expand_weight_gradient;
  expand.bias = args.expand_bias_gradient;
  mean.a = problem.transposed;
  mean.b = {weights.reduce_weight, weights.dtype == DType::f32};
  mean.a_stride = problem.image_stride;
  mean.b_stride = c;
  mean.k = r;
  mean.i = n;
  mean.j = c;
  mean.output = args.mean_gradient;
  Products products = {{reduce, expand, mean}};
  int64_t blocks = 0;
  for (Product& product : products.products) {
    const int64_t columns = product.output.data ? ceil_div(product.j, kTile)
                            : product.bias.data ? 1
                                                : 0;
    product.blocks = static_cast<int>(ceil_div(product.i, kTile) * columns);
    blocks += product.blocks;
  }
  launch(products_kernel<T>, dim3(blocks_of(blocks)), kProductThreads, kProductBytes, args.stream,
         products);
}

template <class T>
void run_pool(const SqueezeExcitePoolCuda& args, bool products) {
  const Shares shares =
      shares_of_images<T>(args.images, args.rows, args.channels, products ? kUnroll / 2 : kUnroll);
  const Tiles& tiles = shares.tiles;
  const Pool<T> pool = {
      args.sums,
      args.products,
      static_cast<const T*>(args.input),
      static_cast<const T*>(args.upstream),
      args.rows,
      shares.block_rows,
      shares.blocks,
      tiles,
      args.channels % kVector<T> == 0 && is_aligned(args.input) && is_aligned(args.upstream)};
  const dim3 grid(blocks_of(args.images * shares.blocks * tiles.chunks));
  const int64_t shared = int64_t{4} * (products ? 2 : 1) * tiles.lanes * tiles.width * kVector<T>;
  if (products) {
    launch(pool_kernel<T, true>, grid, kThreads, shared, args.stream, pool);
  } else {
    launch(pool_kernel<T, false>, grid, kThreads, shared, args.stream, pool);
  }
}

template <class T>
void run_scale(const SqueezeExciteScaleCuda& args) {
  const Tiles tiles = tiles_of<T>(args.channels, kThreads, kWidest);
  // Up to 8 steps a block load the gate less often, as long as every processor has some 16 blocks.
  const int64_t step = int64_t{kUnroll} * tiles.lanes;
  const int64_t most = ceil_div(args.rows, step), all = args.images * most * tiles.chunks;
  const int64_t steps =
      max_of(1, min_of(min_of(8, most), all / (16 * int64_t{device_properties().processors})));
  const int64_t blocks = ceil_div(args.rows, steps * step);
  const Scale<T> scale = {static_cast<T*>(args.output),
                          static_cast<const T*>(args.input),
                          static_cast<const T*>(args.gate),
                          args.offset,
                          static_cast<float>(args.factor),
                          args.rows,
                          static_cast<int>(steps),
                          static_cast<int>(blocks),
                          tiles,
                          args.channels % kVector<T> == 0 && is_aligned(args.input) &&
                              is_aligned(args.output) && is_aligned(args.gate)};
  launch(scale_kernel<T>, dim3(blocks_of(args.images * blocks * tiles.chunks)), kThreads, 0,
         args.stream, scale);
}

}  // namespace

bool squeeze_excite_fits(int64_t channels, int64_t reduced) {
  // What the gradient's kernel takes at most (see gradient_bytes).
  const int64_t vectors = 2 * kGradientImages * (channels + reduced + 16);
  const int64_t sums = max_of(4 * kGateThreads, kGateWarps * kGradientImages * kWarp * 8);
  return 4 * (vectors + sums) <= device_properties().shared_memory;
}

int64_t squeeze_excite_pool_blocks(DType dtype, int64_t images, int64_t rows, int64_t channels,
                                   bool products) {
  int64_t blocks = 0;
  with_dtype(dtype, [&](auto value) {
    blocks =
        shares_of_images<decltype(value)>(images, rows, channels, products ? kUnroll / 2 : kUnroll)
            .blocks;
  });
  return blocks;
}

int64_t squeeze_excite_gate_scratch(int64_t images, int64_t channels, int64_t reduced) {
  return 2 * round_up(images * channels, 4) + 2 * images * stride_of(reduced) +
         reduced * stride_of(images);
}

void squeeze_excite_pool_cuda(const SqueezeExcitePoolCuda& args) {
  if (args.images == 0 || args.channels == 0) return;
  with_dtype(args.dtype,
             [&](auto value) { run_pool<decltype(value)>(args, args.products != nullptr); });
}

void squeeze_excite_scale_cuda(const SqueezeExciteScaleCuda& args) {
  if (args.images == 0 || args.rows == 0 || args.channels == 0) return;
  with_dtype(args.dtype, [&](auto value) { run_scale<decltype(value)>(args); });
}

void squeeze_excite_gate_cuda(const SqueezeExciteGateCuda& args) {
  if (args.images == 0 || args.weights.channels == 0) return;
  with_dtype(args.weights.dtype, [&](auto value) {
    using T = decltype(value);
    // Four images read the weights once, but need four times the arithmetic of a block.
    const Gate<T> many =
        gate_of<T>(args.weights, args.mean, args.images, args.blocks, args.factor, kManyImages);
    const bool fits = shared_bytes(many, kManyImages) <= device_properties().shared_memory / 2;
    if (2 * args.images >= device_properties().processors && fits) {
      run_gate<T, kManyImages>(args);
    } else {
      run_gate<T, 1>(args);
    }
  });
}

void squeeze_excite_gate_backward_cuda(const SqueezeExciteGateBackwardCuda& args) {
  if (args.weights.channels == 0) return;
  with_dtype(args.weights.dtype, [&](auto value) { run_gate_backward<decltype(value)>(args); });
}

}  // namespace effkernels
