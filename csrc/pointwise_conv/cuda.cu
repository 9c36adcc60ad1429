// 1x1 convolution, a product over the channels of every pixel:
//
//   output[p, k] = activation(scale[k] * sum_c weight[k, c] * gate[n, c] * input[p, c] + bias[k]
//                             + residual[p, k])            n: the image of pixel p
//   sums[n, tile, k] = the output's sum over the image's pixels of one tile
//
// Layout: NHWC, [pixels, C] and [pixels, K]; weights [K, C].
//
// Moves input, residual and output once; the weights, and the input for more than 64 outputs, come
// again from the L2. B0's projection 96 -> 24 at 56 x 56, batch 256, 2 bytes: 193 MB, 64 us at
// 3.0 TB/s, where its 1.8 G multiply-adds, 4.9 G with the tile's empty columns, take 17 us of an
// H100's mma.sync (0.29 P/s, some 60 % of what wgmma has). Even padded they hide behind memory: a
// step of 16 channels of 128 pixels is 4 KB, 300 clocks of a processor's share of memory, and 100
// of its tensor cores. So neither wgmma nor a tile of 32 or 96 outputs would make it faster.
//
// The idea: a block has 128 pixels x 64 outputs, a warp 32 x 32 of them. cp.async runs three stages
// of 64 bytes a row ahead (two blocks a processor: 72 KB under way, 40 are needed). The gate is a
// third operand: its rows, one an image, are in the stage, `load_matrices` gives every lane the
// factors of its own fragment, and one multiplication of two values each is the prologue. Rows of
// weights lie in such an order in shared memory that a lane ends with 8 neighbouring outputs of a
// row: no way back through shared memory for stores of 16 bytes. Where there are few pixels, tiles
// are 64 x 32.
//
// Lost, by the compiler's output: three blocks a processor (80 registers) spill on one architecture
// or the other, whichever way the code is turned. No GPU has run this.
//
// promise: product.*128, 64> threads 256, shared 81920, warps 16, loads 16, stores 16, tensor cores
// promise: product.*64, 32> threads 64, shared 40960, warps 8, loads 16, stores 16, tensor cores
#include <climits>

#include "common/cuda.h"
#include "common/cuda_product.h"
#include "pointwise_conv/cuda.h"

namespace effkernels {
namespace {

constexpr int kStages = 4;
constexpr int kStageBytes = 64;  // of a row that a stage holds: two steps
constexpr int kRowChunks = kStageBytes / kChunk;
constexpr int kWarpRows = 32, kWarpOutputs = 32;  // of the tile, a warp's
constexpr int kFewestRows = 64;                   // of a tile, of all that there are

template <class T>
struct Product {
  T* output;
  float* sums;
  const T* input;
  const T* weight;
  const float* scale;
  const float* bias;
  const T* gate;
  const T* residual;
  int64_t rows;
  int pixels, channels, outputs, places;
  int images;           // that a tile may touch
  bool aligned_input;   // input, weight and gate: rows of whole chunks
  bool aligned_output;  // output and residual
  Activation activation;
};

// The order of a stage's rows of weights: a lane's 8 sums of a row of the output are those of
// neighbouring outputs then, which it stores at once.
__device__ inline int output_of_row(int row) {
  const int within = row % kWarpOutputs;
  return row - within + within % 8 / 2 * 8 + within / 8 * 2 + within % 2;
}

// Chunk `chunk` of a row of a stage: eight rows' chunks lie in different banks.
__device__ inline int place_of(int row, int chunk) {
  return row * kStageBytes + (chunk ^ (row / 2 % kRowChunks)) * kChunk;
}

template <class T, int kRows, int kOutputs>
__global__ void __launch_bounds__(kRows / kWarpRows * (kOutputs / kWarpOutputs) * kWarp,
                                  kRows == 128 ? 2 : 8) product_kernel(Product<T> p) {
  constexpr int kWarpsDown = kRows / kWarpRows;
  constexpr int kThreads = kWarpsDown * (kOutputs / kWarpOutputs) * kWarp;
  constexpr int kStageValues = kStageBytes / static_cast<int>(sizeof(T));
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  const int warp_row = thread / kWarp % kWarpsDown * kWarpRows;
  const int warp_output = thread / kWarp / kWarpsDown * kWarpOutputs;
  const int across = (p.outputs + kOutputs - 1) / kOutputs;
  const int tile = static_cast<int>(blockIdx.x / across);
  const int first_output = static_cast<int>(blockIdx.x % across) * kOutputs;
  const int64_t first_row = int64_t{tile} * kRows;
  const int rows = p.rows - first_row < kRows ? static_cast<int>(p.rows - first_row) : kRows;
  const int first_image = static_cast<int>(first_row / p.pixels);
  const int first_pixel = static_cast<int>(first_row % p.pixels);  // of that image
  const int images = p.gate == nullptr ? 0 : (first_pixel + rows - 1) / p.pixels + 1;
  const int stage_bytes = (kRows + kOutputs + (p.gate == nullptr ? 0 : p.images)) * kStageBytes;
  unsigned char* const stages = dynamic_shared();
  const T* const input = p.input + first_row * p.channels;
  const T* const weight = p.weight + int64_t{first_output} * p.channels;
  const T* const gate = p.gate + int64_t{first_image} * p.channels;

  // Rows of a stage: the input's, the weights', the gate's.
  const auto fetch = [&](int stage) {
    unsigned char* to = stages + stage % kStages * stage_bytes;
    const int thread = thread_anew();
    const int chunk = thread % kRowChunks, first = stage * kStageValues + chunk * kVector<T>;
#pragma unroll
    for (int row = thread / kRowChunks; row < kRows; row += kThreads / kRowChunks) {
      copy_chunk(to + place_of(row, chunk), input + (row < rows ? row * p.channels : 0), first,
                 p.channels, row < rows, p.aligned_input);
    }
    to += kRows * kStageBytes;
#pragma unroll
    for (int row = thread / kRowChunks; row < kOutputs; row += kThreads / kRowChunks) {
      const int output = output_of_row(row);
      const bool exists = first_output + output < p.outputs;
      copy_chunk(to + place_of(row, chunk), weight + (exists ? output * p.channels : 0), first,
                 p.channels, exists, p.aligned_input);
    }
    to += kOutputs * kStageBytes;
    for (int row = thread / kRowChunks; row < images; row += kThreads / kRowChunks) {
      copy_chunk(to + place_of(row, chunk), gate + row * p.channels, first, p.channels, true,
                 p.aligned_input);
    }
  };

  // What `load_matrices` is given: a lane's row of the first of a warp's matrices, and its chunk.
  const int lane_row = lane % 8 + lane / 8 % 2 * 8, lane_chunk = lane / 16;
  const int weight_row = lane % 8 + lane / 16 * 8, weight_chunk = lane / 8 % 2;
  int gate_row[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = warp_row + 16 * i + lane_row;
    gate_row[i] = kRows + kOutputs + (first_pixel + (row < rows ? row : rows - 1)) / p.pixels;
  }

  float sum[2][4][4] = {};
  const int count = (p.channels + kStageValues - 1) / kStageValues;
#pragma unroll
  for (int stage = 0; stage < kStages - 1; stage++) {
    if (stage < count) fetch(stage);
    commit_copies();
  }
  for (int stage = 0; stage < count; stage++) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (stage + kStages - 1 < count) fetch(stage + kStages - 1);
    commit_copies();
    const unsigned char* const from = stages + stage % kStages * stage_bytes;
#pragma unroll
    for (int step = 0; step < kStageBytes / kStepBytes; step++) {
      uint32_t left[2][4], right[2][4];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        load_matrices(left[i],
                      from + place_of(warp_row + 16 * i + lane_row, 2 * step + lane_chunk));
        if (p.gate != nullptr) {
          uint32_t factor[4];
          load_matrices(factor, from + place_of(gate_row[i], 2 * step + lane_chunk));
#pragma unroll
          for (int j = 0; j < 4; j++) {
            if constexpr (sizeof(T) == 4) {
              left[i][j] = float_word(word_float(left[i][j]) * word_float(factor[j]));
            } else {
              left[i][j] = multiply2<T>(left[i][j], factor[j]);
            }
          }
        }
        load_matrices(right[i], from + place_of(kRows + warp_output + 16 * i + weight_row,
                                                2 * step + weight_chunk));
      }
      const Fragment<T, 4> a[2] = {Fragment<T, 4>(left[0]), Fragment<T, 4>(left[1])};
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const Fragment<T, 2> b(right[j / 2] + j % 2 * 2);
#pragma unroll
        for (int i = 0; i < 2; i++) multiply_add_step<T>(sum[i][j], a[i], b);
      }
    }
  }
  wait_copies<0>();

  // sum[i][j][2 h + l] is of row 16 i + 8 h + lane / 4 and output 8 (lane % 4) + 2 j + l.
  const int output = first_output + warp_output + lane % 4 * 8;
  const int left = p.outputs - output;
  float scale[8], bias[8];
#pragma unroll
  for (int c = 0; c < 8; c++) {
    scale[c] = p.scale != nullptr && c < left ? p.scale[output + c] : 1.0f;
    bias[c] = p.bias != nullptr && c < left ? p.bias[output + c] : 0.0f;
  }
  float values[4][8];
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const int row = warp_row + 8 * r + lane / 4;
    const int64_t at = (first_row + row) * p.outputs + output;
#pragma unroll
    for (int c = 0; c < 8; c++) {
      values[r][c] = sum[r / 2][c / 2][r % 2 * 2 + c % 2] * scale[c] + bias[c];
    }
    if (p.residual != nullptr && row < rows) {
#pragma unroll
      for (int v = 0; v < 8; v += kVector<T>) {
        if (v >= left) continue;
        float more[kVector<T>];
        load(p.residual + at + v, left - v, p.aligned_output, more);
#pragma unroll
        for (int c = 0; c < kVector<T>; c++) values[r][v + c] += more[c];
      }
    }
  }
  with_activation(p.activation, [&](auto constant) {
#pragma unroll
    for (int r = 0; r < 4; r++) {
#pragma unroll
      for (int c = 0; c < 8; c++) values[r][c] = activate<decltype(constant){}()>(values[r][c]);
    }
  });
#pragma unroll
  for (int r = 0; r < 4; r++) {
    const int row = warp_row + 8 * r + lane / 4;
    const int64_t at = (first_row + row) * p.outputs + output;
#pragma unroll
    for (int v = 0; v < 8; v += kVector<T>) {
      if (row >= rows || v >= left) continue;
      float part[kVector<T>];
#pragma unroll
      for (int c = 0; c < kVector<T>; c++) part[c] = values[r][v + c];
      store(p.output + at + v, left - v, p.aligned_output, part);
    }
  }

  if (p.sums == nullptr) return;
  // Of every image that the tile touches: over a lane's rows, the lanes of a column, the warps.
  float* const totals = reinterpret_cast<float*>(stages);  // [kWarpsDown][kOutputs]
  const int last = (first_pixel + rows - 1) / p.pixels;
  for (int image = 0; image <= last; image++) {
    const int begin = image * p.pixels - first_pixel, end = begin + p.pixels;
    __syncthreads();
#pragma unroll
    for (int c = 0; c < 8; c++) {
      float total = 0.0f;
#pragma unroll
      for (int r = 0; r < 4; r++) {
        const int row = warp_row + 8 * r + lane / 4;
        total += row >= begin && row < end && row < rows ? values[r][c] : 0.0f;
      }
#pragma unroll
      for (int distance = 4; distance < kWarp; distance *= 2) {
        total += __shfl_xor_sync(kAllLanes, total, distance);
      }
      if (lane < 4) totals[warp_row / kWarpRows * kOutputs + warp_output + lane * 8 + c] = total;
    }
    __syncthreads();
    const int64_t place = tile - (int64_t{first_image} + image) * p.pixels / kRows;
    for (int k = thread; k < kOutputs && first_output + k < p.outputs; k += kThreads) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarpsDown; w++) total += totals[w * kOutputs + k];
      p.sums[((int64_t{first_image} + image) * p.places + place) * p.outputs + first_output + k] =
          total;
    }
  }
}

template <class T, int kRows, int kOutputs>
void run(Product<T> p, int64_t tiles, Stream stream) {
  const int64_t across = ceil_div(p.outputs, kOutputs);
  if (tiles * across > INT_MAX) throw std::invalid_argument("pointwise_conv: too many pixels");
  p.images = static_cast<int>(min_of(kRows, ceil_div(kRows - 1, p.pixels) + 1));
  const int64_t rows = kRows + kOutputs + (p.gate == nullptr ? 0 : p.images);
  launch(product_kernel<T, kRows, kOutputs>, dim3(static_cast<unsigned>(tiles * across)),
         kRows / kWarpRows * (kOutputs / kWarpOutputs) * kWarp, rows * kStageBytes * kStages,
         stream, p);
}

template <class T>
void run(const PointwiseConvCuda& args) {
  if (args.pixels > INT_MAX / 2 || args.channels > INT_MAX / 256 || args.outputs > INT_MAX / 256) {
    throw std::invalid_argument("pointwise_conv: an image or a row of weights is too large");
  }
  Product<T> p{};
  p.output = static_cast<T*>(args.output);
  p.sums = args.sums;
  p.input = static_cast<const T*>(args.input);
  p.weight = static_cast<const T*>(args.weight);
  p.scale = args.scale;
  p.bias = args.bias;
  p.gate = static_cast<const T*>(args.gate);
  p.residual = static_cast<const T*>(args.residual);
  p.rows = args.images * args.pixels;
  p.pixels = static_cast<int>(args.pixels);
  p.channels = static_cast<int>(args.channels);
  p.outputs = static_cast<int>(args.outputs);
  p.places = static_cast<int>(args.places);
  p.aligned_input = p.channels % kVector<T> == 0 && is_aligned(p.input) && is_aligned(p.weight) &&
                    is_aligned(p.gate);
  p.aligned_output = p.outputs % kVector<T> == 0 && is_aligned(p.output) && is_aligned(p.residual);
  p.activation = args.activation;
  // Large tiles where there are two for a processor.
  const int64_t tiles = ceil_div(p.rows, 128);
  if (tiles * ceil_div(args.outputs, 64) >= 2 * device_properties().processors) {
    run<T, 128, 64>(p, tiles, args.stream);
  } else {
    run<T, 64, 32>(p, ceil_div(p.rows, 64), args.stream);
  }
}

}  // namespace

int64_t pointwise_conv_cuda_places(int64_t pixels) { return ceil_div(pixels - 1, kFewestRows) + 1; }

void pointwise_conv_cuda(const PointwiseConvCuda& args) {
  if (args.images * args.pixels * args.outputs == 0) return;
  with_dtype(args.dtype, [&](auto value) { run<decltype(value)>(args); });
}

}  // namespace effkernels
