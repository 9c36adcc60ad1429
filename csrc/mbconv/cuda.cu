// An inverted residual's expansion and depthwise convolution in one kernel:
//
//   expanded = activation(expand_scale[e] * sum_c expand_weight[e, c] * input[p, c]
//                         + expand_bias[e]), zero around the image             never in memory
//   output   = activation(scale[e] * (taps * expanded) + bias[e])
//   partials[n, tile, e] = the output's sum over a tile's pixels, for squeeze-and-excitation
//
// Layout: NHWC; input [N, H, W, C], expand_weight [E, C], taps [k * k, E], output [N, H', W', E].
//
// Moves the input once and the rim of tiles again from the L2, and the output once. B0's second
// block (112 x 112, 16 -> 96 channels, stride 2), batch 256, 2 bytes: 103 + 154 MB, 86 us at
// 3.0 TB/s; two kernels move 103 + 2 * 617 + 154 MB, 497 us. The instructions counted below make it
// 305 us (mbconv_config.py), the third block (56 x 56, 24 -> 144) 225 of 244.
//
// The idea: a block has a tile of outputs of one image. The part of the input that the windows see
// is in shared memory for all chunks of 32 expanded channels, through which the block walks; the
// next chunk's weights arrive meanwhile. A chunk is two phases. Tensor cores expand the pixels that
// lie inside the image (so nothing is computed for padding), the epilogue writes them where they
// belong in a tile whose rim was zeroed once. Then each thread convolves two channels of 4 x 4
// outputs: 36 reads of shared memory for 288 multiply-adds at k = 3, all of it in registers. While
// one block of a processor expands, in tensor cores and special function units, the other
// convolves.
//
// Why mma.sync: of 24 to 40 channels a chunk's product is 2 or 3 steps deep. For the second block
// it is 21 M multiply-adds an image, 0.07 us of an H100 by mma.sync; memory takes 0.34 us an image.
//
// What limits are instructions (sm_90, bfloat16): 495 for a thread's 16 outputs of two channels at
// k = 3 (of them 288 multiply-adds, 72 to unpack), 1139 at k = 5, and 330 for their SiLU, sums
// and stores; with strides of 2 633 and 1314. 145 a warp for all that is around the product of 16
// pixels and 32 channels, 15 for each of its steps. SiLU takes one special function of bfloat16 in
// place of two (`activate_as`): at two, 16 a clock and processor, it would be the limit.
//
// Lost, by the compiler's output: taps kept in registers over several strips (spills at k = 5), the
// tile's sizes in registers (spills; they are in shared memory now, and the threads' numbers are
// read anew), three blocks a processor (80 registers: spills on one architecture or the other,
// whichever way the code is turned), a store of 4 bytes an output, with an address and a mask each
// (by way of shared memory a lane stores 16). No GPU has run this.
//
// Shared memory goes by the problem. 80 KB are what an early block takes on an A100; two of 113 KB
// fit on an H100, and deep inputs (C > 100 in float32) take all of a processor's.
// promise: expand_depth.* threads 256, shared 81920, warps 16, loads 16, stores 16, tensor cores
#include <climits>

#include "common/cuda.h"
#include "common/cuda_product.h"
#include "common/cuda_rows.h"
#include "mbconv/cuda.h"

namespace effkernels {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChannels = 32;          // expanded at a time
constexpr int kPairs = kChannels / 2;  // a thread convolves two channels
constexpr int kStrips = kThreads / kPairs;
constexpr int kTile = 4;     // x kTile outputs of a thread
constexpr int kVectors = 4;  // scale and bias of both convolutions

constexpr int up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// Shared memory of a block. First what has a fixed size, in bytes from the beginning; twice, but
// for the totals, for this chunk of channels and the next.
template <class T, int kKernel>
struct Fixed {
  static constexpr int kTapRow = kChannels * static_cast<int>(sizeof(T));
  static constexpr int kTaps = 0, kTapBytes = kKernel * kKernel * kTapRow;
  static constexpr int kVector = kTaps + 2 * kTapBytes, kVectorBytes = kVectors * kChannels * 4;
  static constexpr int kTotals = kVector + 2 * kVectorBytes;  // [kStrips][kChannels]
  static constexpr int kTile = kTotals + kStrips * kChannels * 4;
  // A row of outputs of a warp's two strips, on its way to whole vectors: four pixels each, the
  // second where its pixels lie in the other banks.
  static constexpr int kTileBytes = 48;
  static constexpr int kRow = kTile + kTileBytes, kHalf = 4 * kTapRow + (sizeof(T) == 2 ? 64 : 0);
  static constexpr int kWeights = kRow + kWarps * 2 * kHalf;
};

// What a phase needs to know of a tile: in shared memory it takes no registers in the other one.
template <class T>
struct Tile {
  T* output;         // of the first pixel
  float* partials;   // of the tile
  int down, across;  // outputs
  int strips_across, strips;
  int inside;  // pixels that the windows see of the image
};

// Bytes of an expanded pixel. Threads of 16 pairs and then 16 more, four outputs further, read one
// each: those of 2 bytes lie in all banks.
template <class T, int kStride>
constexpr int kPixel =
    kChannels * static_cast<int>(sizeof(T)) + (sizeof(T) == 2 && kStride == 2 ? 8 : 16);

// Then the weights, twice [kChannels] rows; the expanded pixels around the tile, those beyond the
// image included; the pixels of the input that make them; and where each of those is expanded.
struct Layout {
  int row;  // bytes of weights, or of a pixel of the input
  int seen_width, expanded, input, positions, end;
};

template <class T>
struct Fused {
  T* output;
  float* partials;
  const T* input;
  const T* expand_weight;
  const T* taps;
  const float* vectors[kVectors];
  int height, width, channels, expanded, output_height, output_width, top, left;
  int tile_height, tile_width, tiles_down, tiles_across, groups;
  int chunks;      // of expanded channels
  int row_chunks;  // of 16 bytes, of a pixel of the input
  Layout shared;
  bool aligned_input;    // rows of input and expand_weight are whole chunks
  bool aligned_taps;     // those of taps are
  bool aligned_vectors;  // and those of the floats
  bool aligned_output;   // and those of output
  Activation activation;
};

template <class T, int kKernel, int kStride>
__global__ void __launch_bounds__(kThreads, 2) expand_depthwise_kernel(Fused<T> p) {
  constexpr int kSpan = (kTile - 1) * kStride + kKernel;  // rows and columns that a thread sees
  using At = Fixed<T, kKernel>;
  static_assert(sizeof(Tile<T>) <= At::kTileBytes);
  const Layout& s = p.shared;
  unsigned char* const shared = dynamic_shared();
  int* const positions = reinterpret_cast<int*>(shared + s.positions);
  float* const totals = reinterpret_cast<float*>(shared + At::kTotals);
  const int thread = static_cast<int>(threadIdx.x);
  const int group = static_cast<int>(blockIdx.x % p.groups);
  const int tiles = p.tiles_down * p.tiles_across;
  const int tile = static_cast<int>(blockIdx.x / p.groups % tiles);
  const int64_t image = blockIdx.x / p.groups / tiles;
  const int first_y = tile / p.tiles_across * p.tile_height;
  const int first_x = tile % p.tiles_across * p.tile_width;
  const int left_down = p.output_height - first_y, left_across = p.output_width - first_x;
  const int down = left_down < p.tile_height ? left_down : p.tile_height;
  const int across = left_across < p.tile_width ? left_across : p.tile_width;

  // The pixels that the windows see: a rectangle, and what of it is inside the image.
  const int corner_y = first_y * kStride - p.top, corner_x = first_x * kStride - p.left;
  const int begin_y = corner_y > 0 ? corner_y : 0, begin_x = corner_x > 0 ? corner_x : 0;
  const int seen_end_y = corner_y + (down - 1) * kStride + kKernel;
  const int seen_end_x = corner_x + (across - 1) * kStride + kKernel;
  const int end_y = seen_end_y < p.height ? seen_end_y : p.height;
  const int end_x = seen_end_x < p.width ? seen_end_x : p.width;
  const int inside_width = end_x > begin_x ? end_x - begin_x : 0;
  const int inside = end_y > begin_y ? (end_y - begin_y) * inside_width : 0;

  Tile<T>* const place = reinterpret_cast<Tile<T>*>(shared + At::kTile);
  if (thread == 0) {
    place->output =
        p.output + ((image * p.output_height + first_y) * p.output_width + first_x) * p.expanded;
    place->partials = p.partials + (image * tiles + tile) * p.expanded;
    place->down = down;
    place->across = across;
    place->strips_across = (across + kTile - 1) / kTile;
    place->strips = (down + kTile - 1) / kTile * place->strips_across;
    place->inside = inside;
  }
  const T* const input = p.input + image * p.height * p.width * p.channels;
#pragma unroll 1
  for (int pixel = thread / 8; pixel < inside; pixel += kThreads / 8) {
    const int y = begin_y + pixel / inside_width, x = begin_x + pixel % inside_width;
    if (thread % 8 == 0) {
      positions[pixel] =
          s.expanded + ((y - corner_y) * s.seen_width + x - corner_x) * kPixel<T, kStride>;
    }
    const T* const row = input + (y * p.width + x) * p.channels;
#pragma unroll 1
    for (int c = thread % 8; c < p.row_chunks; c += 8) {
      copy_chunk(shared + s.input + pixel * s.row + c * kChunk, row, c * kVector<T>, p.channels,
                 true, p.aligned_input);
    }
  }
  // Around the image the expanded tensor is zero, for all channels.
  for (int at = s.expanded + thread * kChunk; at < s.input; at += kThreads * kChunk) {
    store_words(shared + at, Words{});
  }

  // Weights, taps and vectors of a chunk of channels.
  const auto fetch = [&](int chunk) {
    const int thread = thread_anew();
    const int first = chunk * kChannels, buffer = chunk / p.groups % 2;
    {
      const int row = thread / 8, e = first + row;
      unsigned char* const to = shared + At::kWeights + (buffer * kChannels + row) * s.row;
      const bool exists = e < p.expanded;
#pragma unroll 1
      for (int c = thread % 8; c < p.row_chunks; c += 8) {
        copy_chunk(to + c * kChunk, p.expand_weight + (exists ? e * p.channels : 0), c * kVector<T>,
                   p.channels, exists, p.aligned_input);
      }
    }
    constexpr int kTapChunks = At::kTapRow / kChunk;
#pragma unroll 1
    for (int at = thread; at < kKernel * kKernel * kTapChunks; at += kThreads) {
      const int tap = at / kTapChunks, c = at % kTapChunks;
      copy_chunk(shared + At::kTaps + buffer * At::kTapBytes + at * kChunk,
                 p.taps + tap * p.expanded, first + c * kVector<T>, p.expanded, true,
                 p.aligned_taps);
    }
    if (thread < kVectors * kChannels / 4) {
      const int vector = thread / 8, c = thread % 8;
      unsigned char* const to = shared + At::kVector + buffer * At::kVectorBytes + thread * kChunk;
      const float* const from = vector == 0   ? p.vectors[0]
                                : vector == 1 ? p.vectors[1]
                                : vector == 2 ? p.vectors[2]
                                              : p.vectors[3];
      if (from != nullptr) {
        copy_chunk(to, from, first + c * 4, p.expanded, true, p.aligned_vectors);
      } else {
        const float value = vector % 2 == 0 ? 1.0f : 0.0f;
        const float values[4] = {value, value, value, value};
        store_words(to, pack<float>(values));
      }
    }
  };
  const auto store_totals = [&](int chunk) {
    const int e = chunk * kChannels + thread;
    if (thread >= kChannels || e >= p.expanded) return;
    float total = 0.0f;
#pragma unroll
    for (int strip = 0; strip < kStrips; strip++) total += totals[strip * kChannels + thread];
    place->partials[e] = total;
  };

  fetch(group);
  commit_copies();
  int buffer = 0;
  int chunk = group;
  for (; chunk < p.chunks; chunk += p.groups, buffer ^= 1) {
    wait_copies<0>();
    __syncthreads();  // this chunk's weights are there; the last one's convolution is over
    if (p.partials != nullptr && chunk >= p.groups) store_totals(chunk - p.groups);
    if (chunk + p.groups < p.chunks) fetch(chunk + p.groups);
    commit_copies();
    const unsigned char* const vectors = shared + At::kVector + buffer * At::kVectorBytes;

    const int lane = thread_anew() % kWarp, warp = thread_anew() / kWarp;
    // The expansion: warps take 16 pixels at a time, two times at once.
    const unsigned char* const weights = shared + At::kWeights + buffer * kChannels * s.row +
                                         (lane % 8 + lane / 16 * 8) * s.row + lane / 8 % 2 * kChunk;
    const int seen = place->inside, pixel_tiles = (seen + 15) / 16;
#pragma unroll 1
    for (int first = warp; first < pixel_tiles; first += 2 * kWarps) {
      const bool two = first + kWarps < pixel_tiles;
      const unsigned char* from[2];
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int pixel = (first + i * kWarps) * 16 + lane % 16;
        from[i] = shared + s.input + (pixel < seen ? pixel : seen - 1) * s.row + lane / 16 * kChunk;
      }
      float sum[2][4][4] = {};
#pragma unroll 1
      for (int step = 0; step < p.row_chunks / 2; step++) {
        uint32_t left[4], right[2][4];
#pragma unroll
        for (int j = 0; j < 2; j++) {
          load_matrices(right[j], weights + 16 * j * s.row + step * kStepBytes);
        }
#pragma unroll
        for (int i = 0; i < 2; i++) {
          if (i == 1 && !two) continue;
          load_matrices(left, from[i] + step * kStepBytes);
          const Fragment<T, 4> a(left);
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const Fragment<T, 2> b(right[j / 2] + j % 2 * 2);
            multiply_add_step<T>(sum[i][j], a, b);
          }
        }
      }
      // sum[i][j][2 h + l] is of pixel 8 h + lane / 4 and channel 8 j + 2 (lane % 4) + l.
#pragma unroll
      for (int j = 0; j < 4; j++) {
        const int c = 8 * j + lane % 4 * 2;
        const float2 scale = load2(reinterpret_cast<const float*>(vectors) + c);
        const float2 bias = load2(reinterpret_cast<const float*>(vectors) + kChannels + c);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            sum[i][j][2 * h] = sum[i][j][2 * h] * scale.x + bias.x;
            sum[i][j][2 * h + 1] = sum[i][j][2 * h + 1] * scale.y + bias.y;
          }
        }
      }
      with_activation(p.activation, [&](auto constant) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
          for (int j = 0; j < 4; j++) {
#pragma unroll
            for (int r = 0; r < 4; r++) {
              sum[i][j][r] = activate_as<T, decltype(constant){}()>(sum[i][j][r]);
            }
          }
        }
      });
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int pixel = (first + i * kWarps) * 16 + 8 * h + lane / 4;
          if (pixel >= seen) continue;
          T* const to = reinterpret_cast<T*>(shared + positions[pixel]) + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            store2(to + 8 * j, float2{sum[i][j][2 * h], sum[i][j][2 * h + 1]});
          }
        }
      }
    }
    __syncthreads();  // the expanded tile is there

    // The convolution: a thread has two channels of 4 x 4 outputs.
    const int own_thread = thread_anew(), pair = own_thread % kPairs * 2;
    float2 total = {0.0f, 0.0f};
#pragma unroll 1
    for (int own = own_thread / kPairs; own / 2 * 2 < place->strips; own += kStrips) {
      const bool exists = own < place->strips;  // there may be none for half of a warp
      const int strip = exists ? own : own - 1, strips_across = place->strips_across;
      const int y = strip / strips_across * kTile, x = strip % strips_across * kTile;
      const unsigned char* const corner = shared + s.expanded +
                                          (y * s.seen_width + x) * kStride * kPixel<T, kStride> +
                                          pair * static_cast<int>(sizeof(T));
      float2 taps[kKernel * kKernel];
#pragma unroll
      for (int t = 0; t < kKernel * kKernel; t++) {
        taps[t] = load2(reinterpret_cast<const T*>(shared + At::kTaps + buffer * At::kTapBytes +
                                                   t * At::kTapRow) +
                        pair);
      }
      float2 sum[kTile][kTile];
#pragma unroll
      for (int r = 0; r < kTile; r++) {
#pragma unroll
        for (int c = 0; c < kTile; c++) sum[r][c] = {0.0f, 0.0f};
      }
#pragma unroll
      for (int i = 0; i < kSpan; i++) {
        float2 seen[kSpan];
#pragma unroll
        for (int j = 0; j < kSpan; j++) {
          seen[j] = load2(
              reinterpret_cast<const T*>(corner + (i * s.seen_width + j) * kPixel<T, kStride>));
        }
#pragma unroll
        for (int r = 0; r < kTile; r++) {
          const int tap_row = i - r * kStride;
          if (tap_row < 0 || tap_row >= kKernel) continue;
#pragma unroll
          for (int j = 0; j < kKernel; j++) {
            const float2 tap = taps[tap_row * kKernel + j];
#pragma unroll
            for (int c = 0; c < kTile; c++) {
              sum[r][c].x += seen[c * kStride + j].x * tap.x;
              sum[r][c].y += seen[c * kStride + j].y * tap.y;
            }
          }
        }
      }
      const float2 scale = load2(reinterpret_cast<const float*>(vectors) + 2 * kChannels + pair);
      const float2 bias = load2(reinterpret_cast<const float*>(vectors) + 3 * kChannels + pair);
      with_activation(p.activation, [&](auto constant) {
        constexpr Activation kActivation = decltype(constant){}();
#pragma unroll
        for (int r = 0; r < kTile; r++) {
#pragma unroll
          for (int c = 0; c < kTile; c++) {
            sum[r][c].x = activate_as<T, kActivation>(sum[r][c].x * scale.x + bias.x);
            sum[r][c].y = activate_as<T, kActivation>(sum[r][c].y * scale.y + bias.y);
          }
        }
      });
      const int rows = exists ? place->down - y : 0, columns = place->across - x;
      if (p.partials != nullptr) {
        const bool whole = rows >= kTile && columns >= kTile;
#pragma unroll
        for (int r = 0; r < kTile; r++) {
#pragma unroll
          for (int c = 0; c < kTile; c++) {
            if (whole || (r < rows && c < columns)) {
              total.x += sum[r][c].x;
              total.y += sum[r][c].y;
            }
          }
        }
      }
      // A lane stores vectors of its half's pixels, a row of outputs at a time.
      unsigned char* const half = shared + At::kRow + own_thread / kPairs * At::kHalf;
      constexpr int kAcross = kChannels / kVector<T>;  // vectors of a pixel
#pragma unroll
      for (int r = 0; r < kTile; r++) {
#pragma unroll
        for (int c = 0; c < kTile; c++) {
          store2(reinterpret_cast<T*>(half + c * At::kTapRow) + pair, sum[r][c]);
        }
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kTile * kAcross / kPairs; i++) {
          const int at = own_thread % kPairs + i * kPairs;
          const int c = at / kAcross, e = chunk * kChannels + at % kAcross * kVector<T>;
          if (r >= rows || c >= columns || e >= p.expanded) continue;
          store_first(place->output + ((y + r) * p.output_width + x + c) * p.expanded + e,
                      p.expanded - e, p.aligned_output, load_words(half + at * kChunk));
        }
        __syncwarp();
      }
    }
    if (p.partials != nullptr) store2(totals + 2 * own_thread, total);
  }
  if (p.partials == nullptr) return;
  __syncthreads();
  store_totals(chunk - p.groups);
}

template <class T, int kKernel, int kStride>
Layout layout_of(const Fused<T>& p) {
  Layout s{};
  s.seen_width = (up(p.tile_width, kTile) - 1) * kStride + kKernel;
  const int seen_height = (up(p.tile_height, kTile) - 1) * kStride + kKernel;
  const int height = (p.tile_height - 1) * kStride + kKernel;
  const int width = (p.tile_width - 1) * kStride + kKernel;
  const int pixels = (height < p.height ? height : p.height) * (width < p.width ? width : p.width);
  // an odd number of chunks, so that those of eight rows lie in different banks
  s.row = up(p.channels * static_cast<int>(sizeof(T)), kStepBytes) + kChunk;
  s.expanded = Fixed<T, kKernel>::kWeights + 2 * kChannels * s.row;
  s.input = s.expanded + up(seen_height * s.seen_width * kPixel<T, kStride>, kChunk);
  s.positions = s.input + pixels * s.row;
  s.end = s.positions + up(pixels * 4, kChunk);
  return s;
}

template <class T, int kKernel, int kStride>
void run(Fused<T> p, int64_t blocks, Stream stream) {
  p.shared = layout_of<T, kKernel, kStride>(p);
  p.row_chunks = (p.shared.row - kChunk) / kChunk;
  launch(expand_depthwise_kernel<T, kKernel, kStride>, dim3(static_cast<unsigned>(blocks)),
         kThreads, p.shared.end, stream, p);
}

template <class T>
void run(const ExpandDepthwiseCuda& args) {
  Fused<T> p{};
  p.output = static_cast<T*>(args.output);
  p.partials = args.partials;
  p.input = static_cast<const T*>(args.input);
  p.expand_weight = static_cast<const T*>(args.expand_weight);
  p.taps = static_cast<const T*>(args.taps);
  p.vectors[0] = args.expand_scale;
  p.vectors[1] = args.expand_bias;
  p.vectors[2] = args.scale;
  p.vectors[3] = args.bias;
  p.height = static_cast<int>(args.in.height);
  p.width = static_cast<int>(args.in.width);
  p.channels = static_cast<int>(args.in.channels);
  p.expanded = static_cast<int>(args.expanded);
  p.output_height = static_cast<int>(args.output_height);
  p.output_width = static_cast<int>(args.output_width);
  p.top = static_cast<int>(args.geometry.top);
  p.left = static_cast<int>(args.geometry.left);
  p.tile_height = static_cast<int>(args.tile_height);
  p.tile_width = static_cast<int>(args.tile_width);
  p.tiles_down = static_cast<int>(ceil_div(args.output_height, args.tile_height));
  p.tiles_across = static_cast<int>(ceil_div(args.output_width, args.tile_width));
  p.groups = static_cast<int>(args.groups);
  p.chunks = static_cast<int>(ceil_div(args.expanded, kChannels));
  p.aligned_input =
      p.channels % kVector<T> == 0 && is_aligned(p.input) && is_aligned(p.expand_weight);
  p.aligned_taps = p.expanded % kVector<T> == 0 && is_aligned(p.taps);
  p.aligned_vectors = p.expanded % 4 == 0;
  for (const float* vector : p.vectors) p.aligned_vectors &= is_aligned(vector);
  p.aligned_output = p.expanded % kVector<T> == 0 && is_aligned(p.output);
  p.activation = args.activation;
  const int64_t blocks = args.in.count * p.tiles_down * p.tiles_across * args.groups;
  if (blocks > INT_MAX) throw std::invalid_argument("mbconv: too many images");
  const bool wide = args.geometry.kernel_h == 5, sparse = args.geometry.stride_h == 2;
  if (wide) {
    sparse ? run<T, 5, 2>(p, blocks, args.stream) : run<T, 5, 1>(p, blocks, args.stream);
  } else {
    sparse ? run<T, 3, 2>(p, blocks, args.stream) : run<T, 3, 1>(p, blocks, args.stream);
  }
}

void check(const ExpandDepthwiseCuda& args) {
  const Geometry& g = args.geometry;
  if (g.kernel_h != g.kernel_w || (g.kernel_h != 3 && g.kernel_h != 5) ||
      g.stride_h != g.stride_w || g.stride_h > 2 || g.dilation_h != 1 || g.dilation_w != 1) {
    throw std::invalid_argument("mbconv: kernels of 3x3 and 5x5, strides 1 and 2, no dilation");
  }
  const int64_t in = args.in.size(), out = args.output_height * args.output_width * args.expanded;
  if (in > INT_MAX || out > INT_MAX || args.expanded * args.in.channels > INT_MAX) {
    throw std::invalid_argument("mbconv: an image is too large");
  }
  if (args.tile_height < 1 || args.tile_width < 1 || args.groups < 1 || args.tile_height > 256 ||
      args.tile_width > 256 || args.groups > ceil_div(args.expanded, kChannels)) {
    throw std::invalid_argument("mbconv: bad tiles");
  }
}

}  // namespace

void expand_depthwise_cuda(const ExpandDepthwiseCuda& args) {
  check(args);
  if (args.in.count == 0) return;
  with_dtype(args.dtype, [&](auto value) { run<decltype(value)>(args); });
}

}  // namespace effkernels
