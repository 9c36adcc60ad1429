// Winograd's algorithm for 3x3 convolutions of stride 1 (Lavin and Gray 2016):
//
//   Y = A' [ sum over c of (G g[c] G') * (B' d[c] B) ] A
//
// Y is a tile of 2x2 (2x4) outputs, d[c] the 4x4 (4x6) window of channel c that they come from, *
// multiplies element by element: 16 multiplications instead of 36 (24 instead of 72). Element i of
// all windows is a matrix product over channels, so a chunk of tiles goes three ways: windows to
// 16 (24) matrices [tiles, C], each times its weights [C, K], and what lies at a tile's place in
// all the products to its outputs, which end in the epilogue. A chunk's matrices fit half an L2 of
// 1 MB; tiles of a whole batch are one list, so that images share the weights.
//
// Bytes: input and output once, 16/9 (24/9) of the weights once per chunk. G g G' is made when
// weights are packed, in double (effkernels/native.py): [matrices][panels][C, 16].
// Tiles that stick out of the image are computed and cut off. Each is computed by itself, so that
// results depend neither on threads nor on the rest of the batch.
//
// The transforms subtract: an infinity would make NaN of outputs whose windows do not see it, and
// large values overflow that no sum would. Both show in the tile's results: each element of the
// products is part of one. What is not finite is computed again from the untransformed weights,
// tile by tile and panel by panel, as the direct convolution does. (Outputs beside a finite value
// that is larger by many orders of magnitude lose digits to it, as with every such algorithm.)
//
// Errors, of the norm and of the largest element, 64 channels at 28x28, against PyTorch's 1.6e-7
// and 2.3e-7 (at most twice that plus 2.4e-7 is allowed; simulated operation by operation):
//   2x2, points 0, 1, -1, infinity; chains of 64 values (32)     2.2e-7 3.6e-7 (1.7e-7 2.1e-7)
//   2x4, points 0, +-3/4, +-3/2, infinity; chains of 64 (32)     3.9e-7 5.2e-7 (3.0e-7 4.9e-7)
//   2x4, points 0, +-sqrt(1/2), +-sqrt(2), infinity; 32          3.0e-7 3.9e-7, not exact
//   4x4, points 0, +-sqrt(1/2), +-sqrt(2), infinity; 32          5.2e-7 7.5e-7, not allowed
//   4x4, points 0, +-5/8, +-3/2, infinity; 32                    4.9e-7 7.8e-7, not allowed
//   4x4, points 0, +-1, +-2, infinity (the usual ones), 56x56    1.4e-6 5.5e-6, not allowed
// With chains of 256 as in the direct convolution, 256 channels would err by 4.5e-7 (2x2).
// ResNet-18 and -50 at 224x224 err 1.0 to 1.3 times as much as PyTorch, as with direct ones.
//
// Ladder, ms, one image, one core of an Intel Xeon (AVX-512, 2 cores, shared), by layer:
//                                             64, 56x56   128, 28x28   256, 14x14   512, 7x7
//   direct, avx512                              1.51        1.46         1.48         1.86
//   2x2                                         0.93        0.86         0.89         1.42
//   2x4                                         0.80        0.73         0.83         1.32
//   direct, avx2                                2.59        2.70         2.93         2.92
//   2x2                                         1.40        1.34         1.34         2.01
//   2x4                                         1.16        1.09         1.23         1.97
// Chunks of a quarter to four times the size: within 5 %, but a quarter costs avx2 20 % at 512
// channels. 7x7 is bound by its weights, 17 MB from the last cache.
#pragma once

#include "conv/copy_window.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

// Values added up in one chain, fewer than elsewhere (kChain): these sums' errors are multiplied by
// the transform of the outputs.
template <int64_t kLength>
struct Chains : Dense {
  static constexpr int64_t chain = kLength;
};

// One dimension of the transforms, for kOutputs outputs of a 3-tap convolution.
template <int kOutputs>
struct Axis;

// Points 0, 1, -1, infinity.
template <>
struct Axis<2> {
  static constexpr int inputs = 4;

  static EFFKERNELS_INLINE void input(const Vec* d, Vec* to) {
    to[0] = d[0] - d[2];
    to[1] = d[1] + d[2];
    to[2] = d[2] - d[1];
    to[3] = d[1] - d[3];
  }
  static EFFKERNELS_INLINE void output(const Vec* m, Vec* to) {
    to[0] = m[0] + m[1] + m[2];
    to[1] = m[1] - m[2] - m[3];
  }
};

// Points 0, a, -a, b, -b, infinity, with powers that floats hold exactly.
template <>
struct Axis<4> {
  static constexpr int inputs = 6;
  static constexpr float a = 0.75f, b = 1.5f;
  static constexpr float aa = a * a, bb = b * b, aaa = a * aa, bbb = b * bb;

  static EFFKERNELS_INLINE void input(const Vec* d, Vec* to) {
    const Vec sum = Vec::set1(-(aa + bb)), product = Vec::set1(aa * bb);
    to[0] = fma(d[0], product, fma(d[2], sum, d[4]));
    pair(d, a, bb, to + 1);
    pair(d, b, aa, to + 3);
    to[5] = fma(d[1], product, fma(d[3], sum, d[5]));
  }
  // The rows of points p and -p, which are zero at q and -q.
  static EFFKERNELS_INLINE void pair(const Vec* d, float p, float qq, Vec* to) {
    const Vec even = fma(d[2], Vec::set1(-qq), d[4]), odd = fma(d[1], Vec::set1(-qq), d[3]);
    to[0] = fma(odd, Vec::set1(p), even);
    to[1] = fma(odd, Vec::set1(-p), even);
  }
  static EFFKERNELS_INLINE void output(const Vec* m, Vec* to) {
    const Vec even_a = m[1] + m[2], odd_a = m[1] - m[2];
    const Vec even_b = m[3] + m[4], odd_b = m[3] - m[4];
    to[0] = m[0] + even_a + even_b;
    to[1] = fma(odd_a, Vec::set1(a), odd_b * Vec::set1(b));
    to[2] = fma(even_a, Vec::set1(aa), even_b * Vec::set1(bb));
    to[3] = fma(odd_a, Vec::set1(aaa), fma(odd_b, Vec::set1(bbb), m[5]));
  }
};

struct Tile {
  int64_t image, y, x;  // of its first output
};

// Everything about one convolution that its tasks share. A tile is kDown x kAcross outputs.
template <class T, int kAcross>
class Winograd {
 public:
  explicit Winograd(const ConvArgs& args)
      : args_(args),
        down_(ceil_div(args.out_height, kDown)),
        across_(ceil_div(args.out_width, kAcross)),
        depth_(args.in.channels),
        row_(round_up(depth_, kPanel)),
        panels_(ceil_div(args.out_channels, kPanel)) {}

  void run() {
    const int64_t count = args_.in.count * down_ * across_, threads = args_.parallel.threads;
    if (count * args_.out_channels == 0) return;
    const int64_t pairs = ceil_div(panels_, kWide);
    int64_t chunks = ceil_div(count, chunk_tiles()), groups = 1;
    if (chunks < threads) groups = min_of(pairs, ceil_div(threads, chunks));
    if (pairs % groups != 0) groups = 1;
    if (groups == 1) chunks = min_of(count, round_up(chunks, threads));
    const int64_t longest = ceil_div(count, chunks);
    set_layout(longest);
    parallel_for(args_.parallel, chunks * groups, [&](int64_t begin, int64_t end) {
      Buffers buffers = allocate();
      for (int64_t task = begin; task < end; task++) {
        const int64_t chunk = task / groups, group = task % groups;
        const int64_t first = count * chunk / chunks, last = count * (chunk + 1) / chunks;
        transform_input(first, last - first, buffers);
        const int64_t end_pair = pairs * (group + 1) / groups;
        for (int64_t pair = pairs * group / groups; pair < end_pair; pair++) {
          multiply(last - first, pair * kWide, buffers);
          transform_output(first, last - first, pair * kWide, buffers);
        }
      }
    });
  }

 private:
  static constexpr int kDown = 2;
  using Down = Axis<kDown>;
  using Across = Axis<kAcross>;
  using Sums = Chains<kAcross == 2 ? 64 : 32>;
  static constexpr int kOutputs = kDown * kAcross;
  static constexpr int kMatrices = Down::inputs * Across::inputs;  // one product each
  static constexpr int64_t kTaps = 9;
  static constexpr int64_t kWide = kTileChannels / kPanel;  // panels that are multiplied at once

  struct Buffers {
    float *windows, *products, *outputs, *zeros;
    int64_t exact[kWide];  // panels whose untransformed weights lie in scratch
  };

  // Tiles whose transformed windows share an L2 with a panel pair and its products.
  int64_t chunk_tiles() const {
    const int64_t fit = 131072 / (kMatrices * row_);
    return max_of(28, min_of(fit, 112));
  }

  // A line between two matrices keeps them from lying a multiple of 4 KiB apart.
  void set_layout(int64_t longest) {
    matrix_ = longest * row_ + kPanel;
    product_ = longest * kTileChannels + kPanel;
    outputs_ = longest * kOutputs * kTileChannels;
  }

  Buffers allocate() const {
    const int64_t size = kMatrices * (matrix_ + product_) + outputs_ + row_;
    float* memory = scratch(ScratchUse::kPanelRows, static_cast<size_t>(size));
    Buffers b{};
    b.windows = memory;
    b.products = b.windows + kMatrices * matrix_;
    b.outputs = b.products + kMatrices * product_;
    b.zeros = b.outputs + outputs_;
    std::memset(b.zeros, 0, static_cast<size_t>(row_) * sizeof(float));
    for (int64_t& panel : b.exact) panel = -1;
    return b;
  }

  Tile tile_at(int64_t index) const {
    const int64_t image = index / (down_ * across_), place = index % (down_ * across_);
    return {image, place / across_ * kDown, place % across_ * kAcross};
  }

  const T* image(int64_t index) const {
    return static_cast<const T*>(args_.input) + index * args_.in.size();
  }

  void transform_input(int64_t first, int64_t count, const Buffers& buffers) const {
    const Images& in = args_.in;
    const T* zeros = reinterpret_cast<const T*>(buffers.zeros);
    for (int64_t t = 0; t < count; t++) {
      const Tile tile = tile_at(first + t);
      const int64_t top = tile.y - args_.geometry.top, left = tile.x - args_.geometry.left;
      const T* from = image(tile.image);
      const T* pixels[kMatrices];
      for (int64_t i = 0; i < kMatrices; i++) {
        const int64_t y = top + i / Across::inputs, x = left + i % Across::inputs;
        const bool inside = y >= 0 && y < in.height && x >= 0 && x < in.width;
        pixels[i] = inside ? from + (y * in.width + x) * depth_ : zeros;
      }
      float* to = buffers.windows + t * row_;
      int64_t c = 0;
      for (; c + Vec::size <= depth_; c += Vec::size) {
        transform_window<true>(pixels, c, Vec::size, to + c);
      }
      if (c < depth_) transform_window<false>(pixels, c, depth_ - c, to + c);
    }
  }

  // B' d B of up to Vec::size channels of a tile, to rows of all matrices.
  template <bool kWhole>
  void transform_window(const T* const* pixels, int64_t c, int64_t n, float* to) const {
    Vec half[Down::inputs][Across::inputs];  // B' d
#pragma GCC unroll 8
    for (int j = 0; j < Across::inputs; j++) {
      Vec d[Down::inputs], column[Down::inputs];
#pragma GCC unroll 8
      for (int i = 0; i < Down::inputs; i++) {
        const T* p = pixels[i * Across::inputs + j] + c;
        d[i] = kWhole ? Vec::load(p) : load_first(p, n);
      }
      Down::input(d, column);
#pragma GCC unroll 8
      for (int i = 0; i < Down::inputs; i++) half[i][j] = column[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < Down::inputs; i++) {
      Vec row[Across::inputs];
      Across::input(half[i], row);
#pragma GCC unroll 8
      for (int j = 0; j < Across::inputs; j++, to += matrix_) row[j].store(to);
    }
  }

  // The products of a chunk and a panel pair.
  void multiply(int64_t rows, int64_t panel, const Buffers& buffers) const {
    const int64_t here = min_of(kWide, panels_ - panel);
    const int64_t tiles = ceil_div(rows, kTileRows), size = rows / tiles;
    const int64_t larger = rows - size * tiles;  // the first `larger` tiles have one row more
    GemmTile<Sums> functions[2];
    if (here == 1) {
      functions[0] = tile_for<false, kPanel / Vec::size, kTileRows, Sums>(size);
      functions[1] = tile_for<false, kPanel / Vec::size, kTileRows, Sums>(size + (larger > 0));
    } else {
      functions[0] = tile_for<false, kWide * kPanel / Vec::size, kTileRows, Sums>(size);
      functions[1] =
          tile_for<false, kWide * kPanel / Vec::size, kTileRows, Sums>(size + (larger > 0));
    }
    for (int64_t i = 0; i < kMatrices; i++) {
      const float* weights = panels(i, panel);
      // The last register tile makes the next matrix's weights come, see common/gemm.h.
      const int64_t after = panel + 2 * here <= panels_ ? panel + here : 0;
      const float* next = i + 1 < kMatrices ? panels(i + 1, panel) : panels(0, after);
      const float* a = buffers.windows + i * matrix_;
      float* product = buffers.products + i * product_;
      for (int64_t t = 0; t < tiles; t++) {
        functions[t < larger](a, row_, Sums{}, weights, depth_,
                              Ahead{t + 1 == tiles ? next : weights + kAheadLines * kPanel},
                              product, Target{});
        const int64_t done = size + (t < larger);
        a += done * row_;
        product += done * kTileChannels;
      }
    }
  }

  const float* panels(int64_t matrix, int64_t panel) const {
    return args_.transformed + (matrix * panels_ + panel) * kPanel * depth_;
  }

  // A' M A and the epilogue. Tiles of one row of tiles are finished together.
  void transform_output(int64_t first, int64_t count, int64_t panel, Buffers& buffers) const {
    const int64_t channels = min_of(kTileChannels, args_.out_channels - panel * kPanel);
    for (int64_t t = 0; t < count;) {
      const Tile tile = tile_at(first + t);
      const int64_t across = min_of(count - t, across_ - tile.x / kAcross);
      const int64_t line = across * kAcross * kTileChannels;
      for (int64_t i = 0; i < across; i++) {
        const Tile next{tile.image, tile.y, tile.x + i * kAcross};
        float* to = buffers.outputs + i * kAcross * kTileChannels;
        for (int64_t k = 0; k < channels; k += kPanel) {
          if (!transform_product(buffers.products + (t + i) * kTileChannels + k, to + k, line)) {
            compute_exactly(next, panel + k / kPanel, to + k, line, buffers);
          }
        }
      }
      finish(tile, across, panel, channels, buffers.outputs, line);
      t += across;
    }
  }

  // A' M A of a panel's channels; false if a result is not finite.
  bool transform_product(const float* from, float* to, int64_t line) const {
    const Vec zero = Vec::set1(0.0f);
    Vec finite = zero;  // NaN if any value is not finite
#pragma GCC unroll 4
    for (int64_t k = 0; k < kPanel; k += Vec::size) {
      Vec half[kDown][Across::inputs];  // A' M
#pragma GCC unroll 8
      for (int j = 0; j < Across::inputs; j++) {
        Vec m[Down::inputs], column[kDown];
#pragma GCC unroll 8
        for (int i = 0; i < Down::inputs; i++) {
          m[i] = Vec::load(from + (i * Across::inputs + j) * product_ + k);
        }
        Down::output(m, column);
#pragma GCC unroll 8
        for (int i = 0; i < kDown; i++) half[i][j] = column[i];
      }
#pragma GCC unroll 8
      for (int i = 0; i < kDown; i++) {
        Vec row[kAcross];
        Across::output(half[i], row);
#pragma GCC unroll 8
        for (int j = 0; j < kAcross; j++) {
          row[j].store(to + i * line + j * kTileChannels + k);
          finite = fma(row[j], zero, finite);
        }
      }
    }
    return all_below(finite, 1.0f);
  }

  // The sums of a tile and panel from the window itself, as the direct convolution adds them up.
  __attribute__((noinline)) void compute_exactly(const Tile& tile, int64_t panel, float* to,
                                                 int64_t line, Buffers& buffers) const {
    const int64_t depth = kTaps * depth_;
    float* memory =
        scratch(ScratchUse::kRing, static_cast<size_t>((kWide * kPanel + kOutputs) * depth));
    float* weights = memory + panel % kWide * kPanel * depth;
    float* windows = memory + kWide * kPanel * depth;
    if (buffers.exact[panel % kWide] != panel) pack(panel, weights);
    buffers.exact[panel % kWide] = panel;
    for (int64_t i = 0; i < kOutputs; i++) {
      copy_window(image(tile.image), args_.in, args_.geometry, tile.y + i / kAcross,
                  tile.x + i % kAcross, windows + i * depth);
    }
    alignas(64) float sums[kOutputs * kTileChannels];
    for (int64_t i = 0; i < kOutputs; i += kDown) {
      gemm_tile<false, kDown, kPanel / Vec::size>(windows + i * depth, depth, Dense{}, weights,
                                                  depth, Ahead{weights}, sums + i * kTileChannels,
                                                  Target{});
    }
    for (int64_t i = 0; i < kOutputs; i++) {
      std::memcpy(to + i / kAcross * line + i % kAcross * kTileChannels, sums + i * kTileChannels,
                  kPanel * sizeof(float));
    }
  }

  // A panel of the weights [K, C, 3, 3] over depth 3 * 3 * C.
  void pack(int64_t panel, float* to) const {
    const int64_t first = panel * kPanel, count = min_of(kPanel, args_.out_channels - first);
    for (int64_t tap = 0; tap < kTaps; tap++) {
      for (int64_t c = 0; c < depth_; c++, to += kPanel) {
        const float* from = args_.weight + (first * depth_ + c) * kTaps + tap;
        for (int64_t k = 0; k < kPanel; k++) {
          to[k] = k < count ? from[k * depth_ * kTaps] : 0.0f;
        }
      }
    }
  }

  // The epilogue on the outputs of tiles next to each other, but for what sticks out.
  void finish(const Tile& tile, int64_t across, int64_t panel, int64_t channels,
              const float* outputs, int64_t line) const {
    const int64_t width = min_of(across * kAcross, args_.out_width - tile.x);
    const int64_t height = min_of(kDown, args_.out_height - tile.y);
    const T* residual = static_cast<const T*>(args_.epilogue.residual);
    for (int64_t y = 0; y < height; y++) {
      const int64_t pixel = (tile.image * args_.out_height + tile.y + y) * args_.out_width + tile.x;
      const int64_t at = pixel * args_.out_channels + panel * kPanel;
      finish_rows<T>(outputs + y * line, kTileChannels, width, channels, args_.epilogue,
                     panel * kPanel, residual == nullptr ? nullptr : residual + at,
                     static_cast<T*>(args_.output) + at, args_.out_channels, nullptr);
    }
  }

  const ConvArgs& args_;
  const int64_t down_, across_;                     // tiles of an image
  const int64_t depth_, row_, panels_;              // row_: floats of a transformed window's row
  int64_t matrix_ = 0, product_ = 0, outputs_ = 0;  // floats of a matrix's part of the buffers
};

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
