// Winograd's algorithm for 3x3 convolutions of stride 1.
//
//   Y = A' [ sum over c of (G g[c] G') * (B' d[c] B) ] A
//
// d[c] is a 4x4 window of channel c, Y the 2x2 outputs that it makes, * multiplies element by
// element: 16 multiplications for four outputs instead of 36. PLACEHOLDER
#pragma once

#include "conv/copy_window.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

constexpr int64_t kOutputs = 2;                   // of a tile, along each side
constexpr int64_t kInputs = 4;                    // values along a side that they come from
constexpr int64_t kMatrices = kInputs * kInputs;  // one product each

// Sums over channels are shorter than those over windows, but added up as they are their errors
// are larger than the transforms'.
struct Channels : Dense {
  static constexpr int64_t chain = 64;
};

// Tiles as one list, whatever image they lie in.
struct Tiles {
  int64_t down, across;  // of an image

  int64_t of_image() const { return down * across; }
};

struct Tile {
  int64_t image, y, x;  // of its first output
};

inline Tile tile_at(const Tiles& tiles, int64_t index) {
  const int64_t place = index % tiles.of_image();
  return {index / tiles.of_image(), place / tiles.across * kOutputs,
          place % tiles.across * kOutputs};
}

// B' d B of up to Vec::size channels of a tile, to rows of the 16 matrices.
template <bool kWhole, class T>
EFFKERNELS_INLINE void transform_window(const T* const* pixels, int64_t c, int64_t n, float* to,
                                        int64_t matrix) {
  Vec half[kInputs][kInputs];  // B' d
#pragma GCC unroll 4
  for (int j = 0; j < kInputs; j++) {
    Vec d[kInputs];
#pragma GCC unroll 4
    for (int i = 0; i < kInputs; i++) {
      const T* p = pixels[i * kInputs + j] + c;
      d[i] = kWhole ? Vec::load(p) : load_first(p, n);
    }
    half[0][j] = d[0] - d[2];
    half[1][j] = d[1] + d[2];
    half[2][j] = d[2] - d[1];
    half[3][j] = d[1] - d[3];
  }
#pragma GCC unroll 4
  for (int i = 0; i < kInputs; i++, to += kInputs * matrix) {
    const Vec* d = half[i];
    (d[0] - d[2]).store(to + c);
    (d[1] + d[2]).store(to + matrix + c);
    (d[2] - d[1]).store(to + 2 * matrix + c);
    (d[1] - d[3]).store(to + 3 * matrix + c);
  }
}

// Everything about one convolution that its tasks share.
template <class T>
class Winograd {
 public:
  explicit Winograd(const ConvArgs& args)
      : args_(args),
        tiles_{ceil_div(args.out_height, kOutputs), ceil_div(args.out_width, kOutputs)},
        depth_(args.in.channels),
        row_(round_up(depth_, kPanel)),
        panels_(ceil_div(args.out_channels, kPanel)) {}

  void run() {
    const int64_t count = args_.in.count * tiles_.of_image(), threads = args_.parallel.threads;
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
  static constexpr int64_t kWide = kTileChannels / kPanel;  // panels that are multiplied at once

  struct Buffers {
    float *windows, *products, *outputs, *zeros;
    int64_t exact[kWide];  // panels whose untransformed weights lie in scratch
  };

  // Tiles whose transformed windows share an L2 with a panel pair and its products.
  int64_t chunk_tiles() const {
    const int64_t fit = 131072 / (kMatrices * row_);
    return max_of(2 * kTileRows, min_of(fit, 8 * kTileRows));
  }

  // A line between two matrices keeps them from lying a multiple of 4 KiB apart.
  void set_layout(int64_t longest) {
    matrix_ = longest * row_ + kPanel;
    product_ = longest * kTileChannels + kPanel;
    outputs_ = longest * kOutputs * kOutputs * kTileChannels;
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

  const T* image(int64_t index) const {
    return static_cast<const T*>(args_.input) + index * args_.in.size();
  }

  void transform_input(int64_t first, int64_t count, const Buffers& buffers) const {
    const Images& in = args_.in;
    const T* zeros = reinterpret_cast<const T*>(buffers.zeros);
    for (int64_t t = 0; t < count; t++) {
      const Tile tile = tile_at(tiles_, first + t);
      const int64_t top = tile.y - args_.geometry.top, left = tile.x - args_.geometry.left;
      const T* from = image(tile.image);
      const T* pixels[kMatrices];
      for (int64_t i = 0; i < kMatrices; i++) {
        const int64_t y = top + i / kInputs, x = left + i % kInputs;
        const bool inside = y >= 0 && y < in.height && x >= 0 && x < in.width;
        pixels[i] = inside ? from + (y * in.width + x) * depth_ : zeros;
      }
      float* to = buffers.windows + t * row_;
      int64_t c = 0;
      for (; c + Vec::size <= depth_; c += Vec::size) {
        transform_window<true>(pixels, c, Vec::size, to, matrix_);
      }
      if (c < depth_) transform_window<false>(pixels, c, depth_ - c, to, matrix_);
    }
  }

  // The 16 products of a chunk and a panel pair.
  void multiply(int64_t rows, int64_t panel, const Buffers& buffers) const {
    const int64_t here = min_of(kWide, panels_ - panel);
    const int64_t tiles = ceil_div(rows, kTileRows), size = rows / tiles;
    const int64_t larger = rows - size * tiles;  // the first `larger` tiles have one row more
    GemmTile<Channels> functions[2];
    if (here == 1) {
      functions[0] = tile_for<1, kTileRows, Channels>(size);
      functions[1] = tile_for<1, kTileRows, Channels>(size + (larger > 0));
    } else {
      functions[0] = tile_for<kWide, kTileRows, Channels>(size);
      functions[1] = tile_for<kWide, kTileRows, Channels>(size + (larger > 0));
    }
    for (int64_t i = 0; i < kMatrices; i++) {
      const float* weights = panels(i, panel);
      // The last register tile makes the next matrix's weights come, see common/gemm.h.
      const int64_t after = panel + 2 * here <= panels_ ? panel + here : 0;
      const float* next = i + 1 < kMatrices ? panels(i + 1, panel) : panels(0, after);
      const float* a = buffers.windows + i * matrix_;
      float* product = buffers.products + i * product_;
      for (int64_t t = 0; t < tiles; t++) {
        functions[t < larger](a, row_, Channels{}, weights, depth_, t + 1 == tiles ? next : weights,
                              product);
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
      const Tile tile = tile_at(tiles_, first + t);
      const int64_t across = min_of(count - t, tiles_.across - tile.x / kOutputs);
      const int64_t line = across * kOutputs * kTileChannels;
      for (int64_t i = 0; i < across; i++) {
        const Tile next{tile.image, tile.y, tile.x + i * kOutputs};
        float* to = buffers.outputs + i * kOutputs * kTileChannels;
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
      Vec half[kOutputs][kInputs];  // A' M
#pragma GCC unroll 4
      for (int j = 0; j < kInputs; j++) {
        Vec m[kInputs];
#pragma GCC unroll 4
        for (int i = 0; i < kInputs; i++) {
          m[i] = Vec::load(from + (i * kInputs + j) * product_ + k);
        }
        half[0][j] = m[0] + m[1] + m[2];
        half[1][j] = m[1] - m[2] - m[3];
      }
#pragma GCC unroll 2
      for (int i = 0; i < kOutputs; i++) {
        const Vec* m = half[i];
        const Vec even = m[0] + m[1] + m[2], odd = m[1] - m[2] - m[3];
        even.store(to + i * line + k);
        odd.store(to + i * line + kTileChannels + k);
        finite = fma(odd, zero, fma(even, zero, finite));
      }
    }
    return all_below(finite, 1.0f);
  }

  // The sums of a tile and panel from the window itself, as the direct convolution adds them up.
  __attribute__((noinline)) void compute_exactly(const Tile& tile, int64_t panel, float* to,
                                                 int64_t line, Buffers& buffers) const {
    constexpr int64_t kPixels = kOutputs * kOutputs;
    const int64_t depth = kTaps * depth_;
    float* memory =
        scratch(ScratchUse::kRing, static_cast<size_t>((kWide * kPanel + kPixels) * depth));
    float* weights = memory + panel % kWide * kPanel * depth;
    float* windows = memory + kWide * kPanel * depth;
    if (buffers.exact[panel % kWide] != panel) pack(panel, weights);
    buffers.exact[panel % kWide] = panel;
    for (int64_t i = 0; i < kPixels; i++) {
      copy_window(image(tile.image), args_.in, args_.geometry, tile.y + i / kOutputs,
                  tile.x + i % kOutputs, windows + i * depth);
    }
    alignas(64) float sums[kPixels * kTileChannels];
    gemm_tile<kPixels, 1>(windows, depth, Dense{}, weights, depth, weights, sums);
    for (int64_t i = 0; i < kPixels; i++) {
      std::memcpy(to + i / kOutputs * line + i % kOutputs * kTileChannels, sums + i * kTileChannels,
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
    const int64_t width = min_of(across * kOutputs, args_.out_width - tile.x);
    const int64_t height = min_of(kOutputs, args_.out_height - tile.y);
    const T* residual = static_cast<const T*>(args_.epilogue.residual);
    for (int64_t y = 0; y < height; y++) {
      const int64_t pixel = (tile.image * args_.out_height + tile.y + y) * args_.out_width + tile.x;
      const int64_t at = pixel * args_.out_channels + panel * kPanel;
      finish_rows<T>(outputs + y * line, kTileChannels, width, channels, args_.epilogue,
                     panel * kPanel, residual == nullptr ? nullptr : residual + at,
                     static_cast<T*>(args_.output) + at, args_.out_channels, nullptr);
    }
  }

  static constexpr int64_t kTaps = 9;

  const ConvArgs& args_;
  const Tiles tiles_;
  const int64_t depth_, row_, panels_;              // row_: floats of a transformed window's row
  int64_t matrix_ = 0, product_ = 0, outputs_ = 0;  // floats of a matrix's part of the buffers
};

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
