// Matrix product over the channels of pixels, the one micro-kernel of every dense convolution.
//
// C[m, k] = epilogue(sum over c of A[m, c] * W[k, c]): m a pixel, c a value of its input row
// (a channel, or a channel of a tap), k an output channel. A row is dense float32, which is how
// NHWC pixels lie in memory, so A is read where it is: only gated, bf16 and windowed inputs are
// first written to rows of scratch. W is packed in panels of 16 output channels (kPanel).
//
// Register tile, rows x channels (accumulators + panel registers of the register file):
//   avx512 14 x 32 (28 + 2 of 32), avx2 6 x 16 or 12 x 8 (12 + 2 of 16),
//   neon 6 x 16 (24 + 4 of 32), portable 4 x 16 (left to the compiler).
// 14 rows divide the 112, 56, 28, 14 pixels of a 224-pixel network's rows. Row counts that the
// tile does not divide are split evenly (7 = 4 + 3), never 6 + 1: a 1-row tile waits for its two
// chains of fma.
//
// The last tile over a pair of panels (kAsking) prefetches the next pair: EfficientNet-B0's weights
// come from the last cache, and the first tile, which needs them four times as fast as the others,
// would wait (5.05 -> 4.89 ms on a Zen 5 core, avx2 9.83 -> 9.28, then into the second cache). The
// others prefetch kAheadLines ahead in the same pair, into the first: 178 -> 202 GFLOP/s of depths
// over 256 on a Xeon, 8 or 32 lines alike (ResNet-50 54 -> 50 ms). On Zen 16 or 40 lines ahead into
// the second cache made no difference; into the first they were not measured there. Spreading the
// next pair over all tiles was no faster on the Xeon.
//
// A tile of over 8 rows has a pointer to every third one only, moved by addition: the addresses of
// the two behind it fit in an instruction. A pointer each is more than the integer registers hold;
// gcc kept the rest in vector registers, and fetching one back takes a turn on the multipliers'
// port (Xeon, operands in L1, 189 -> 204 GFLOP/s with 12 rows and 197 -> 204 with 14).
//
// With avx2 a pass of the inner loop takes two values of depth: 23.5 instead of 26 instructions for
// 12 fma. On a Zen 3 core that is as fast as one in quiet moments, and 8-11 % faster in the slow
// ones of a shared machine; four values a pass, as gcc compiled them, were slower. There the last 8
// of 24 or 40 channels have a tile of 12 rows x 8: EfficientNet-B0 13.5 -> 12.8 ms.
// And there the last eight tiles share in asking for the next panel: a line for each value of depth
// in one tile is more than memory gives, and 49 pixels are nine tiles. Blocks of 7x7 pixels with
// weights that no cache holds 690 -> 600 and 445 -> 405 us, others as fast as before.
//
// Tried and lost on a Xeon with AMX, where this reaches 170-195 GFLOP/s: float32 from three bf16 a
// value and six tile products (a third of fma's error). The product alone made 230-290 GFLOP/s of
// 784 pixels with 160 or 960 channels and the same as here of 49, but EfficientNet-B0 took 8.4
// instead of 7.1 ms and B4 75 instead of 78: values have to be split first, and their parts, 1.5
// times the bytes, sweep the window's rows out of the first cache. Epilogues between the tile
// products hide behind them only from depths of 80 on. Also lost: fetching the next tile's rows of
// A into the first cache (within 5 %, both ways).
//
// The sums leave the registers through a small tile on the stack: the epilogue then is one
// function, whatever the tile. A store and a load per vector, against a fma per value of depth.
// Where the epilogue is only a bias, a residual and limits (none, relu, relu6), and a tile's
// outputs are whole vectors at one stride, the tile does it itself (Target): Zen 3, 71 -> 77
// GFLOP/s of depth 16 with relu6, 78 -> 81 of 24, 91 -> 93 of 96.
#pragma once

#include "common/activation.h"
#include "common/scratch.h"

namespace effkernels {
namespace EFFKERNELS_ISA {

#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx512
constexpr int kTileRows = 14;
constexpr int kTileChannels = 32;
#elif EFFKERNELS_ISA_ID == EFFKERNELS_ID_portable
constexpr int kTileRows = 4;
constexpr int kTileChannels = 16;
#else
constexpr int kTileRows = 6;
constexpr int kTileChannels = 16;
#endif

// Values of depth in a pass of the inner loop.
#if EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2
constexpr int kSteps = 2;
#else
constexpr int kSteps = 1;
#endif

// Values of depth added up in one chain; longer sums are made of such blocks. A chain of n rounds
// like sqrt(n): without blocks the 3x3x512 convolutions of a ResNet err three times as much as
// oneDNN's.
constexpr int64_t kChain = 256;

constexpr int64_t kAheadLines = 32;  // lines of a panel from the one in use to the one asked for

// Tiles at the end of a product that share in asking for the next panels' lines.
constexpr int64_t kAsking = EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2 ? 8 : 1;

// What a tile asks for while it works: a line of every panel at `from`, and `step` bytes further
// for each value of depth.
struct Ahead {
  const float* from;
  int64_t step = kPanel * sizeof(float);
};

// Where the values of a row of A lie, from its start: one after the other, or by a table.
struct Dense {
  static constexpr int64_t chain = kChain;
  EFFKERNELS_INLINE int64_t operator()(int64_t c) const { return c; }
};
struct Table {
  static constexpr int64_t chain = kChain;
  const int32_t* offsets;
  EFFKERNELS_INLINE int64_t operator()(int64_t c) const { return offsets[c]; }
};

// Up to 8 channels of a panel have a tile of one vector and twice the rows.
constexpr bool kHalfPanels = EFFKERNELS_ISA_ID == EFFKERNELS_ID_avx2;

// Where a register tile writes its results min(most, max(least, scale * sum + bias + residual)):
// row r to out + r * stride. The rows of `residual`, if any, have the same stride.
struct Target {
  float* out = nullptr;  // null: nowhere, the raw sums are wanted
  int64_t stride = 0;
  const float *scale = nullptr, *bias = nullptr, *residual = nullptr;
  float least = 0.0f, most = 0.0f;
};

// The same value for every channel of a tile.
struct Constants {
  float values[kTileChannels];
  explicit Constants(float value) {
    for (float& v : values) v = value;
  }
};

// The target of an epilogue that a tile can do itself, for channels [first, first + channels) of
// the whole output; still without `out`, `stride` and `residual`. False: it can't.
inline bool aim(const Epilogue& epilogue, int64_t first, int64_t channels, Target* target) {
  static const Constants ones(1.0f), zeros(0.0f);
  constexpr float kInfinity = __builtin_inff();
  const Activation activation = epilogue.activation;
  // A tile writes all its vectors.
  if (channels % kPanel != 0 && !(kHalfPanels && channels == Vec::size)) return false;
  if (activation != Activation::none && activation != Activation::relu &&
      activation != Activation::relu6) {
    return false;
  }
  target->scale = epilogue.scale == nullptr ? ones.values : epilogue.scale + first;
  target->bias = epilogue.bias == nullptr ? zeros.values : epilogue.bias + first;
  target->least = activation == Activation::none ? -kInfinity : 0.0f;
  target->most = activation == Activation::relu6 ? 6.0f : kInfinity;
  return true;
}

// tile[r * kTileChannels + j] = sum over c of a[r * a_stride + column(c)] * panels[...], for kRows
// rows and kVecs vectors of channels. With kFinish the results go to the target instead, and `tile`
// is scratch.
template <bool kFinish, int kRows, int kVecs, class Column>
inline void gemm_tile(const float* a, int64_t a_stride, Column column, const float* panels,
                      int64_t depth, Ahead ahead, float* tile, const Target& target) {
  constexpr int kPerPanel = kPanel / Vec::size;
  constexpr int kPanels = (kVecs + kPerPanel - 1) / kPerPanel;
  constexpr int kReach = kRows > 8 ? 3 : kRows;  // rows addressed from one pointer
  const int64_t reach = kReach * a_stride;
  for (int64_t begin = 0; begin == 0 || begin < depth; begin += Column::chain) {
    const int64_t end = min_of(depth, begin + Column::chain);
    Vec sums[kRows][kVecs];
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; v++) sums[r][v] = Vec::set1(0.0f);
    }
    const auto step = [&](int64_t c) EFFKERNELS_LAMBDA_INLINE {
      const float* from = a + column(c);
      Vec w[kVecs];
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; v++) {
        const float* panel = panels + (v / kPerPanel) * depth * kPanel;
        w[v] = Vec::load(panel + c * kPanel + (v % kPerPanel) * Vec::size);
      }
#pragma GCC unroll 16
      for (int p = 0; p < kPanels; p++) {
        const char* line =
            reinterpret_cast<const char*>(ahead.from + p * depth * kPanel) + c * ahead.step;
        prefetch_first(line);
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
        if (r > 0 && r % kReach == 0) from = opaque(from + reach);
        const Vec x = Vec::set1(from[r % kReach * a_stride]);
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; v++) sums[r][v] = fma(x, w[v], sums[r][v]);
      }
    };
    int64_t c = begin;
    for (; c + kSteps <= end; c += kSteps) {
#pragma GCC unroll 4
      for (int s = 0; s < kSteps; s++) step(c + s);
    }
    if constexpr (kSteps > 1) {
      for (; c < end; c++) step(c);
    }
    if (begin > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; v++) {
          sums[r][v] = sums[r][v] + Vec::load(tile + r * kTileChannels + v * Vec::size);
        }
      }
    }
    if (kFinish && end >= depth) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; v++) {
        const Vec scale = Vec::load(target.scale + v * Vec::size);
        const Vec bias = Vec::load(target.bias + v * Vec::size);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++) sums[r][v] = fma(sums[r][v], scale, bias);
      }
      if (target.residual != nullptr) {
        const float* residual = target.residual;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; r++, residual += target.stride) {
#pragma GCC unroll 16
          for (int v = 0; v < kVecs; v++) {
            sums[r][v] = sums[r][v] + Vec::load(residual + v * Vec::size);
          }
        }
      }
      const Vec least = Vec::set1(target.least), most = Vec::set1(target.most);
      float* out = target.out;
#pragma GCC unroll 16
      for (int r = 0; r < kRows; r++, out += target.stride) {
#pragma GCC unroll 16
        for (int v = 0; v < kVecs; v++) {
          min(most, max(least, sums[r][v])).store(out + v * Vec::size);
        }
      }
      return;
    }
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
#pragma GCC unroll 16
      for (int v = 0; v < kVecs; v++) {
        sums[r][v].store(tile + r * kTileChannels + v * Vec::size);
      }
    }
  }
}

template <class Column>
using GemmTile = void (*)(const float*, int64_t, Column, const float*, int64_t, Ahead, float*,
                          const Target&);

template <bool kFinish, int kVecs, int kRows, class Column>
inline GemmTile<Column> tile_for(int64_t rows) {
  if constexpr (kRows == 1) {
    return gemm_tile<kFinish, 1, kVecs, Column>;
  } else {
    return rows == kRows ? gemm_tile<kFinish, kRows, kVecs, Column>
                         : tile_for<kFinish, kVecs, kRows - 1, Column>(rows);
  }
}

// Raw sums of so many register tiles are finished together, so that the epilogue's loops are long.
constexpr int kBatch = 4;

// Gives no tile a target.
struct Nowhere {
  EFFKERNELS_INLINE Target operator()(int64_t, int64_t) const { return Target{}; }
};

// `rows` rows of A times `channels` output channels, up to kTileChannels: finish(row, count, sums)
// is called for a few tiles at a time with their raw sums, [count, kTileChannels]. Tiles for whose
// rows place(row, count) gives a target are finished there instead.
template <class Column, class Finish, class Place>
inline void gemm_rows(const float* a, int64_t a_stride, Column column, int64_t rows,
                      const float* panels, int64_t channels, int64_t depth, const float* next,
                      Finish&& finish, Place&& place) {
  constexpr int kPerPanel = kPanel / Vec::size;
  alignas(64) float sums[kBatch * kTileRows * kTileChannels];
  const bool half = kHalfPanels && channels <= Vec::size;
  const int64_t tiles = ceil_div(rows, half ? 2 * kTileRows : kTileRows);
  const int64_t size = tiles == 0 ? 0 : rows / tiles;
  const int64_t larger = rows - size * tiles;  // the first `larger` tiles have one row more
  GemmTile<Column> functions[2][2];            // [finished][larger]
  const auto use = [&](auto vecs, auto most) {
    constexpr int kVecs = decltype(vecs)::value, kMost = decltype(most)::value;
    functions[0][0] = tile_for<false, kVecs, kMost, Column>(size);
    functions[0][1] = tile_for<false, kVecs, kMost, Column>(size + (larger > 0));
    if constexpr (!std::is_same_v<std::decay_t<Place>, Nowhere>) {
      functions[1][0] = tile_for<true, kVecs, kMost, Column>(size);
      functions[1][1] = tile_for<true, kVecs, kMost, Column>(size + (larger > 0));
    }
  };
  constexpr std::integral_constant<int, kTileRows> usual;
  if (half) {
    if constexpr (kHalfPanels) {
      use(std::integral_constant<int, 1>{}, std::integral_constant<int, 2 * kTileRows>{});
    }
  } else if (channels <= kPanel) {
    use(std::integral_constant<int, kPerPanel>{}, usual);
  } else if constexpr (kTileChannels == 2 * kPanel) {
    use(std::integral_constant<int, 2 * kPerPanel>{}, usual);
  }
  constexpr int64_t kRoom = kBatch * kTileRows;
  const int64_t asking = min_of(tiles, kAsking);
  int64_t row = 0, waiting = 0;  // rows whose raw sums are not finished yet
  for (int64_t t = 0; t < tiles; t++) {
    const int64_t count = size + (t < larger);
    const Target target = place(row, count);
    const bool placed = target.out != nullptr;
    if (waiting > 0 && (placed || waiting + count > kRoom)) {
      finish(row - waiting, waiting, sums);
      waiting = 0;
    }
    // Every tile asks for what it will need soon, the last ones for the next panels.
    Ahead ahead{panels + kAheadLines * kPanel};
    if (t >= tiles - asking) {
      const int64_t part = t - (tiles - asking);
      ahead = {next + part * depth / asking * kPanel, ahead.step / asking};
    }
    functions[placed][t < larger](a + row * a_stride, a_stride, column, panels, depth, ahead,
                                  sums + waiting * kTileChannels, target);
    row += count;
    if (!placed) waiting += count;
  }
  if (waiting > 0) finish(row - waiting, waiting, sums);
}

template <class Column, class Finish>
inline void gemm_rows(const float* a, int64_t a_stride, Column column, int64_t rows,
                      const float* panels, int64_t channels, int64_t depth, const float* next,
                      Finish&& finish) {
  gemm_rows(a, a_stride, column, rows, panels, channels, depth, next, finish, Nowhere{});
}

// A dense convolution as a matrix product. prepare(image, first, rows, buffer) returns the rows
// [first, first + rows) of an image's A: where they are, or written to `buffer` first.
struct GemmShape {
  int64_t images, rows, depth, channels;  // A is [images][rows, depth], C [images][rows, channels]
  bool buffered;                          // prepare writes to its buffer
};

// Rows of a chunk: its A (256 KiB) and one panel pair share a core's L2, and a few tiles at least
// use each panel that was fetched.
inline int64_t chunk_rows(int64_t depth) {
  const int64_t rows = 65536 / max_of(depth, 1) / kTileRows * kTileRows;
  return max_of(4 * kTileRows, min_of(rows, 36 * kTileRows));
}

// How a product is cut into tasks: chunks of rows times groups of panels. The threads should get
// the same amount of work each; rows are cut between any two, panels cannot be.
struct Cut {
  int64_t chunks, groups;
};

// With few rows the panels are split: every thread then reads its own weights only.
inline Cut cut_evenly(const GemmShape& shape, int64_t threads) {
  const int64_t least = ceil_div(shape.rows, chunk_rows(shape.depth));
  const int64_t tasks = shape.images * least, panels = ceil_div(shape.channels, kPanel);
  if (tasks < threads) {
    const int64_t groups = ceil_div(threads, tasks);
    const int64_t most = ceil_div(panels, groups) * groups;
    if (groups <= panels && 10 * most <= 11 * panels) return {least, groups};
  }
  const int64_t chunks = ceil_div(round_up(tasks, threads), shape.images);
  return {min_of(chunks, shape.rows), 1};
}

// `sums`, if any, is [images][chunks, channels] with chunks = ceil(rows / chunk_rows(depth)):
// column sums of every chunk's results, which do not depend on the number of threads.
template <class T, class Prepare>
inline void gemm(const GemmShape& shape, const float* packed, const Epilogue& epilogue, T* out,
                 float* sums, const Parallel& parallel, Prepare&& prepare) {
  if (shape.rows == 0 || shape.images == 0 || shape.channels == 0) return;
  const int64_t size = chunk_rows(shape.depth), panels = ceil_div(shape.channels, kPanel);
  Cut cut{ceil_div(shape.rows, size), 1};
  if (sums == nullptr) {
    cut = cut_evenly(shape, parallel.threads);
  } else {
    cut.groups = min_of(panels, ceil_div(parallel.threads, shape.images * cut.chunks));
  }
  // Between whole register tiles where that is not far from even.
  const int64_t unit = shape.rows >= 8 * kTileRows * cut.chunks ? kTileRows : 1;
  const auto first_row = [&](int64_t chunk) {
    if (sums != nullptr) return min_of(shape.rows, chunk * size);
    return min_of(shape.rows, ceil_div(shape.rows, unit) * chunk / cut.chunks * unit);
  };
  const int64_t longest =
      sums != nullptr ? size : (ceil_div(ceil_div(shape.rows, unit), cut.chunks)) * unit;
  constexpr int64_t kWide = kTileChannels / kPanel;
  const T* residual = static_cast<const T*>(epilogue.residual);
  parallel_for(parallel, shape.images * cut.chunks * cut.groups, [&](int64_t begin, int64_t end) {
    float* buffer = nullptr;
    if (shape.buffered) {
      buffer = scratch(ScratchUse::kPanelRows, static_cast<size_t>(longest * shape.depth));
    }
    for (int64_t task = begin; task < end; task++) {
      const int64_t group = task % cut.groups, image = task / cut.groups / cut.chunks;
      const int64_t chunk = task / cut.groups % cut.chunks, first = first_row(chunk);
      const int64_t rows = first_row(chunk + 1) - first;
      const float* a = prepare(image, first, rows, buffer);
      const int64_t start = (image * shape.rows + first) * shape.channels;
      float* sum = sums == nullptr ? nullptr : sums + (image * cut.chunks + chunk) * shape.channels;
      const int64_t last = panels * (group + 1) / cut.groups;
      for (int64_t panel = panels * group / cut.groups; panel < last;) {
        const int64_t here = min_of(last - panel, kWide), k = panel * kPanel;
        const int64_t count = min_of(shape.channels - k, here * kPanel);
        for (int64_t c = 0; sum != nullptr && c < count; c++) sum[k + c] = 0.0f;
        panel += here;
        const int64_t next = panel < last ? min_of(panel, panels - here) : 0;
        Target target;
        const bool aimed = aim(epilogue, k, count, &target) && sum == nullptr;
        target.stride = shape.channels;
        gemm_rows(
            a, shape.depth, Dense{}, rows, packed + k * shape.depth, count, shape.depth,
            packed + next * kPanel * shape.depth,
            [&](int64_t row, int64_t rows_done, const float* tile) {
              const int64_t at = start + row * shape.channels + k;
              finish_rows<T>(tile, kTileChannels, rows_done, count, epilogue, k,
                             residual == nullptr ? nullptr : residual + at, out + at,
                             shape.channels, sum == nullptr ? nullptr : sum + k);
            },
            [&](int64_t row, int64_t) {
              if constexpr (std::is_same_v<T, float>) {
                if (aimed) {
                  const int64_t at = start + row * shape.channels + k;
                  target.out = out + at;
                  if (residual != nullptr) target.residual = residual + at;
                }
              }
              return target;
            });
      }
    }
  });
}

// Copies `count` values as float32, each times its gate if there is one.
template <class T>
inline void convert_row(const T* from, const float* gate, int64_t count, float* to) {
  int64_t c = 0;
  for (; c + Vec::size <= count; c += Vec::size) {
    Vec x = Vec::load(from + c);
    if (gate != nullptr) x = x * Vec::load(gate + c);
    x.store(to + c);
  }
  if (c < count) {
    Vec x = load_first(from + c, count - c);
    if (gate != nullptr) x = x * Vec::load(gate + c, count - c);
    x.store(to + c, count - c);
  }
}

// The product of a 1x1 convolution: input [images][rows, depth] in T, gate [images, depth] or null.
template <class In, class T>
inline void pointwise_gemm(const GemmShape& pixels, const In* input, const float* gate,
                           const float* packed, const Epilogue& epilogue, T* out, float* sums,
                           const Parallel& parallel) {
  constexpr bool kConvert = !std::is_same_v<In, float>;
  GemmShape shape = pixels;
  shape.buffered = kConvert || gate != nullptr;
  gemm<T>(shape, packed, epilogue, out, sums, parallel,
          [&](int64_t image, int64_t first, int64_t rows, float* buffer) -> const float* {
            const In* from = input + (image * shape.rows + first) * shape.depth;
            if constexpr (!kConvert) {
              if (gate == nullptr) return from;
            }
            const float* factors = gate == nullptr ? nullptr : gate + image * shape.depth;
            for (int64_t r = 0; r < rows; r++) {
              convert_row(from + r * shape.depth, factors, shape.depth, buffer + r * shape.depth);
            }
            return buffer;
          });
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
