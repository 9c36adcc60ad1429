// mbconv: the inverted-residual block of one image after the other.
//
//   expanded = expand(expand_weight * input)              [H, W, E]    never whole in memory
//   hidden   = depthwise(depthwise_weight (*) expanded)   [H', W', E]  the block's one scratch
//   gate     = squeeze_excite_gate(mean(hidden))          [E]
//   output   = project(project_weight * (gate . hidden))  [H', W', K]
//
// Layout NHWC. Operations: H W C E + k k H' W' E + H' W' E K multiply-adds. Bytes through memory:
// input, output and hidden once, against five passes over tensors of E channels when every op is
// separate.
//
// Expand and depthwise: a task owns one panel of expanded channels and a band of output rows. It
// keeps a ring of expanded rows, padded left and right with zeros, filled by the matrix product a
// few rows at a time and drained by the window as soon as an output row has its k rows. The ring
// (k + few rows of W pixels of one panel: 20-60 KB) stays in L1/L2. The depthwise epilogue leaves
// one sum per output row, from which the mean is added up in a fixed order: results do not depend
// on bands or threads.
//
// The gate cuts the block: hidden must be complete before the project product starts. It is then
// multiplied into the project's weights, or where those are the larger (7x7 pixels), into hidden's
// rows chunk by chunk (common/gemm.h).
//
// A block without a gate has no such cut: where an image's hidden would not stay in L2 it is made
// and projected a band of rows at a time, with a ring for every panel.
//
// With at least as many images as threads every thread takes whole images: nothing is shared,
// hidden stays in its L2.
//
// Ladder, EfficientNet-B0 224, batch 1, one thread of a Zen 4 core (avx512); ms of all layers added
// up, before -> after each step, measured side by side on a shared machine:
//   silu with a division, not a Newton reciprocal (common/activation.h)      11.7 -> 10.8 (warm)
//   gate into the project's weights where hidden has more values             12.4-13.0 -> 12.2-12.9
//   window tiles of 14, 7, 4, 2, 1 outputs instead of 8, 4, 1                11.8-12.3 -> 11.7-11.8
// The same network on a Zen 3 core (avx2), ms of a call, the least of interleaved runs:
//   silu by a table, two vectors side by side; two depths a pass of the product  14.0 -> 13.5
//   3x3 and 5x5 windows unrolled; panels of eight channels                       13.5 -> 12.8
//   short rows finished together (another process beside it)                     13.5 -> 13.0
//
// MobileNetV2 there, the blocks of a call added up: 8.0 -> 7.5 ms by windows that walk along the
// row, bands, products finished in registers and weights asked for by eight tiles (common/window.h,
// gemm.h). Of that bands made the first block (no expansion, 112 pixels) 520 -> 480 us, the one of
// 144 channels and 56 pixels 820 -> 760, that of 96 with stride 2 no faster.
//
// Tried and lost: a ring of one panel where one of two is over 24 KB (1.24-1.26 ms instead of
// 1.21-1.28 on 16 -> 96 at 112 pixels, though it then fits L1); prefetching weights
// (common/gemm.h).
// perf says of 13 ms: matrix product 7.7, at the core's peak of 95 GFLOP/s; expand's epilogue 1.0;
// window with its epilogue 2.1; Python 1.2.
#include "common/gate.h"
#include "common/gemm.h"
#include "common/reduce.h"
#include "common/window.h"
#include "mbconv/mbconv.h"

namespace effkernels {
namespace EFFKERNELS_ISA {
namespace {

// The rows of one panel of expanded channels, as the window needs them.
struct Ring {
  float* data;    // [slots][width, kTileChannels], then one row of zeros
  int64_t slots;  // image row y lives in slot y % slots
  int64_t width;  // pixels of a row with its padding
  int64_t batch;  // image rows expanded at once
  int64_t end;    // image columns that some window sees: [0, end)
  int64_t row_size() const { return width * kTileChannels; }
  float* row(int64_t y) const { return data + y % slots * row_size(); }
  const float* zeros() const { return data + slots * row_size(); }
  size_t size() const { return static_cast<size_t>((slots + 1) * row_size()); }
};

Ring make_ring(const MBConvArgs& args) {
  const Geometry& g = args.geometry;
  Ring ring{};
  ring.width = (args.out_width - 1) * g.stride_w + g.dilation_w * (g.kernel_w - 1) + 1;
  ring.end = max_of(0, min_of(args.in.width, ring.width - g.left));
  // Short rows are expanded several at a time, to fill the register tile.
  const bool all_columns = ring.end == args.in.width;
  ring.batch = all_columns ? max_of(1, min_of(args.in.height, ceil_div(56, args.in.width))) : 1;
  ring.slots = g.dilation_h * (g.kernel_h - 1) + ring.batch;
  return ring;
}

// Image rows [y, y + count) into the ring, for the panels at `channel`.
void expand_rows(const MBConvArgs& args, const float* image, const Ring& ring, int64_t y,
                 int64_t count, int64_t channel, int64_t channels) {
  const int64_t depth = args.in.channels, columns = ring.end, left = args.geometry.left;
  if (columns == 0) return;
  const int64_t panels = ceil_div(channels, kPanel);
  const int64_t after = min_of(channel / kPanel + panels, ceil_div(args.expanded, kPanel) - panels);
  Target target;
  const bool aimed = aim(args.expand, channel, channels, &target);
  target.stride = kTileChannels;
  gemm_rows(
      image + y * args.in.width * depth, depth, Dense{}, count * columns,
      args.expand_weight + channel * depth, channels, depth,
      args.expand_weight + after * kPanel * depth,
      [&](int64_t pixel, int64_t rows, const float* tile) {
        while (rows > 0) {  // a tile may cross the end of an image row
          const int64_t row = pixel / columns, x = pixel % columns;
          const int64_t n = min_of(rows, columns - x);
          finish_rows<float>(tile, kTileChannels, n, channels, args.expand, channel, nullptr,
                             ring.row(y + row) + (left + x) * kTileChannels, kTileChannels,
                             nullptr);
          tile += n * kTileChannels;
          pixel += n;
          rows -= n;
        }
      },
      [&](int64_t pixel, int64_t rows) {
        const int64_t row = pixel / columns, x = pixel % columns;
        const bool here = aimed && x + rows <= columns;
        target.out = here ? ring.row(y + row) + (left + x) * kTileChannels : nullptr;
        return target;
      });
}

// Short output rows are finished several at a time, as long as a pixel's row fits kRowPixels: the
// epilogue's loop takes a while to get going. Their sums are then one, too; the groups do not
// depend on bands.
int64_t finished_rows(const MBConvArgs& args) {
  if (args.expand_weight == nullptr) return 1;
  return max_of(1, min_of(args.out_height, kRowPixels / max_of(args.out_width, 1)));
}

int64_t finished_groups(const MBConvArgs& args) {
  return ceil_div(args.out_height, finished_rows(args));
}

// The image row after the last one that output rows before `last` see.
int64_t seen_end(const MBConvArgs& args, int64_t last) {
  const Geometry& g = args.geometry;
  const int64_t reach = g.dilation_h * (g.kernel_h - 1);
  return min_of(args.in.height, (last - 1) * g.stride_h - g.top + reach + 1);
}

// hidden rows [first, last) of `panels` panels from `channel` on, and their sums if asked for;
// whole groups of finished rows. Image rows before `next` are in the ring, those from `stop` on
// will not be needed; returns the new `next`.
int64_t expand_depthwise(const MBConvArgs& args, const float* image, const Ring& ring,
                         int64_t channel, int64_t panels, int64_t first, int64_t last, int64_t next,
                         int64_t stop, float* hidden, float* row_sums) {
  const Geometry& g = args.geometry;
  const int64_t channels = min_of(args.expanded - channel, panels * kPanel);
  const int64_t weight_stride = round_up(args.expanded, kPanel);
  const size_t taps = static_cast<size_t>(g.kernel_h);
  const float** rows = static_cast<const float**>(__builtin_alloca(taps * sizeof(const float*)));
  const int64_t reach = g.dilation_h * (g.kernel_h - 1);
  const int64_t group = finished_rows(args);
  constexpr int64_t kVecs = kTileChannels / Vec::size;
  alignas(64) float sums[kVecs][kRowPixels * Vec::size];
  for (int64_t y = first; y < last; y++) {
    const int64_t top = y * g.stride_h - g.top;
    next = max_of(next, top);
    const int64_t needed = min_of(stop, top + reach + 1);
    while (next < needed) {
      const int64_t count = min_of(ring.batch, stop - next);
      expand_rows(args, image, ring, next, count, channel, channels);
      next += count;
    }
    for (int64_t ky = 0; ky < g.kernel_h; ky++) {
      const int64_t row = top + ky * g.dilation_h;
      rows[ky] = row < 0 || row >= args.in.height ? ring.zeros() : ring.row(row);
    }
    const int64_t begin = y / group * group;  // of this group
    float* out = hidden + (begin - first) * args.out_width * args.expanded + channel;
    float* sum = nullptr;
    if (row_sums != nullptr) {
      sum = row_sums + y / group * args.expanded + channel;
      for (int64_t c = 0; y == begin && c < channels; c++) sum[c] = 0.0f;
    }
    const float* weight = args.depthwise_weight + channel;
    if (group == 1) {
      padded_window_row<kTileChannels>(rows, g, args.out_width, weight, weight_stride, channels,
                                       args.depthwise, channel, out, args.expanded, sum);
      continue;
    }
    for (int64_t c = 0; c < channels; c += Vec::size) {
      padded_window_sums<kTileChannels>(
          rows, g, 0, args.out_width, c, weight + c, weight_stride,
          sums[c / Vec::size] + (y - begin) * args.out_width * Vec::size);
    }
    if (y + 1 != min_of(last, begin + group)) continue;
    for (int64_t c = 0; c < channels; c += Vec::size) {
      finish_rows<float>(sums[c / Vec::size], Vec::size, (y + 1 - begin) * args.out_width,
                         min_of(channels - c, Vec::size), args.depthwise, channel + c, nullptr,
                         out + c, args.expanded, sum == nullptr ? nullptr : sum + c);
    }
  }
  return next;
}

// The same of a convolution of the image itself.
void depthwise_rows(const MBConvArgs& args, const float* image, int64_t first, int64_t last,
                    float* hidden, float* row_sums) {
  const int64_t weight_stride = round_up(args.expanded, kPanel);
  const size_t taps = static_cast<size_t>(args.geometry.kernel_h);
  const float** rows = static_cast<const float**>(__builtin_alloca(taps * sizeof(float*)));
  for (int64_t y = first; y < last; y++) {
    float* sum = row_sums == nullptr ? nullptr : row_sums + y * args.expanded;
    for (int64_t c = 0; sum != nullptr && c < args.expanded; c++) sum[c] = 0.0f;
    window_row(image, args.in, args.geometry, y, args.out_width, args.depthwise_weight,
               weight_stride, args.depthwise, hidden + (y - first) * args.out_width * args.expanded,
               rows, sum);
  }
}

// Values of hidden (64 and 256 KB): of a band where it is made band by band, and of an image from
// which on it is.
constexpr int64_t kBandValues = 16384;
constexpr int64_t kBandwise = 65536;

// Bands of output rows that share a panel's work between threads. Every band expands the rows that
// it shares with its neighbour again, so bands pay only where the panels cannot be dealt out
// evenly.
int64_t band_count(const MBConvArgs& args, int64_t panels, int64_t threads) {
  const int64_t shared = args.geometry.dilation_h * (args.geometry.kernel_h - 1);
  const int64_t rows = max_of(1, args.in.height);
  int64_t best = 1;
  double least = 0.0;
  for (int64_t bands = 1; bands <= min_of(finished_groups(args), 2 * threads); bands++) {
    const double most =
        static_cast<double>(ceil_div(panels * bands, threads)) / static_cast<double>(bands);
    const double work = most * static_cast<double>(rows + shared * (bands - 1));
    if (bands == 1 || work < least) {
      best = bands;
      least = work;
    }
  }
  return best;
}

void hidden_rows(const MBConvArgs& args, const float* image, float* hidden, float* row_sums,
                 const Parallel& parallel) {
  const int64_t row = args.out_width * args.expanded;
  if (args.expand_weight == nullptr) {
    parallel_for(parallel, args.out_height, [&](int64_t begin, int64_t end) {
      depthwise_rows(args, image, begin, end, hidden + begin * row, row_sums);
    });
    return;
  }
  const int64_t panels = ceil_div(args.expanded, kPanel);
  const int64_t bands = band_count(args, panels, parallel.threads);
  const int64_t groups = finished_groups(args), rows = finished_rows(args);
  parallel_for(parallel, panels * bands, [&](int64_t begin, int64_t end) {
    Ring ring = make_ring(args);
    ring.data = scratch(ScratchUse::kRing, ring.size());
    for (int64_t task = begin; task < end;) {
      const int64_t band = task / panels, panel = task % panels;
      const int64_t count = min_of(min_of(end - task, panels - panel), kTileChannels / kPanel);
      const int64_t first = band * groups / bands * rows;
      const int64_t last = min_of(args.out_height, (band + 1) * groups / bands * rows);
      std::memset(ring.data, 0, ring.size() * sizeof(float));  // the padding stays zero
      expand_depthwise(args, image, ring, panel * kPanel, count, first, last, 0,
                       seen_end(args, last), hidden + first * row, row_sums);
      task += count;
    }
  });
}

// A block without a gate needs no whole hidden: output rows [first, last), a band of them at a
// time. Every pair of panels keeps its ring, so that no row is expanded twice.
template <class T>
void run_bands(const MBConvArgs& args, const float* image, const Epilogue& project, int64_t first,
               int64_t last, T* output) {
  const int64_t row = args.out_width * args.expanded, group = finished_rows(args);
  const int64_t size = round_up(max_of(1, kBandValues / max_of(1, row)), group);
  const int64_t panels = ceil_div(args.expanded, kPanel), pair = kTileChannels / kPanel;
  Ring ring{};
  size_t rings = 0;
  if (args.expand_weight != nullptr) {
    ring = make_ring(args);
    rings = static_cast<size_t>(ceil_div(panels, pair)) * ring.size();
  }
  float* data = scratch(ScratchUse::kRing, rings + static_cast<size_t>(size * row));
  float* hidden = data + rings;
  std::memset(data, 0, rings * sizeof(float));  // the padding stays zero
  const int64_t stop = seen_end(args, last);
  int64_t next = 0;
  for (int64_t y = first; y < last; y += size) {
    const int64_t end = min_of(last, y + size);
    if (args.expand_weight == nullptr) {
      depthwise_rows(args, image, y, end, hidden, nullptr);
    } else {
      int64_t after = next;
      for (int64_t panel = 0; panel < panels; panel += pair) {
        ring.data = data + static_cast<size_t>(panel / pair) * ring.size();
        after = expand_depthwise(args, image, ring, panel * kPanel, min_of(pair, panels - panel), y,
                                 end, next, stop, hidden, nullptr);
      }
      next = after;
    }
    const int64_t start = y * args.out_width * args.out_channels;
    Epilogue epilogue = project;
    if (project.residual != nullptr) {
      epilogue.residual = static_cast<const T*>(project.residual) + start;
    }
    const GemmShape shape{1, (end - y) * args.out_width, args.expanded, args.out_channels, false};
    pointwise_gemm<float, T>(shape, hidden, nullptr, args.project_weight, epilogue, output + start,
                             nullptr, Parallel{1, nullptr});
  }
}

// Below this many weights another thread takes longer to wake than to help.
constexpr int64_t kWorthThreads = 32768;

// Packed weights times the gate of their input channels.
void gate_panels(const float* packed, const float* gate, int64_t depth, int64_t channels,
                 float* out, const Parallel& parallel) {
  const Parallel alone{1, nullptr};
  parallel_for(depth * channels < kWorthThreads ? alone : parallel, ceil_div(channels, kPanel),
               [&](int64_t begin, int64_t end) {
                 for (int64_t panel = begin; panel < end; panel++) {
                   for (int64_t c = 0; c < depth; c++) {
                     const Vec factor = Vec::set1(gate[c]);
                     const int64_t at = (panel * depth + c) * kPanel;
                     for (int64_t k = at; k < at + kPanel; k += Vec::size) {
                       (Vec::load(packed + k) * factor).store(out + k);
                     }
                   }
                 }
               });
}

template <class T>
void run_image(const MBConvArgs& args, int64_t index, const Parallel& parallel) {
  const int64_t pixels = args.out_height * args.out_width, expanded = args.expanded;
  const T* input = static_cast<const T*>(args.input) + index * args.in.size();
  const int64_t converted = std::is_same_v<T, float> ? 0 : round_up(args.in.size(), 16);
  const int64_t sums = args.squeeze_excite ? round_up((args.out_height + 2) * expanded, 16) : 0;
  // The gate multiplies whichever is smaller: the project's weights once, or the rows of hidden.
  const int64_t panels = round_up(args.out_channels, kPanel);
  const int64_t gated = args.squeeze_excite && panels < pixels ? panels * expanded : 0;
  const bool bandwise = !args.squeeze_excite && pixels * expanded > kBandwise;
  const int64_t whole = bandwise ? 0 : pixels * expanded;  // of hidden
  float* buffer =
      scratch(ScratchUse::kBlock, static_cast<size_t>(converted + sums + gated + whole));
  float* row_sums = args.squeeze_excite ? buffer + converted : nullptr;
  float* gated_weight = buffer + converted + sums;
  float* hidden = gated_weight + gated;
  const float* image;
  if constexpr (std::is_same_v<T, float>) {
    image = input;
  } else {
    const int64_t row = args.in.width * args.in.channels;
    parallel_for(parallel, args.in.height, [&](int64_t begin, int64_t end) {
      convert_row(input + begin * row, nullptr, (end - begin) * row, buffer + begin * row);
    });
    image = buffer;
  }
  const int64_t offset = index * pixels * args.out_channels;
  T* output = static_cast<T*>(args.output) + offset;
  Epilogue project = args.project;
  if (project.residual != nullptr) {
    project.residual = static_cast<const T*>(project.residual) + offset;
  }
  if (bandwise) {
    const int64_t group = finished_rows(args);
    parallel_for(parallel, finished_groups(args), [&](int64_t begin, int64_t end) {
      run_bands<T>(args, image, project, begin * group, min_of(args.out_height, end * group),
                   output);
    });
    return;
  }
  hidden_rows(args, image, hidden, row_sums, parallel);
  const float* weight = args.project_weight;
  float* gate = nullptr;
  if (args.squeeze_excite) {
    float* mean = row_sums + args.out_height * expanded;
    gate = mean + expanded;
    reduce_rows(row_sums, finished_groups(args), expanded, 1.0f / static_cast<float>(pixels), mean);
    gate_row(args.gate, mean, gate);
    if (gated > 0) {
      gate_panels(args.project_weight, gate, expanded, args.out_channels, gated_weight, parallel);
      weight = gated_weight;
      gate = nullptr;
    }
  }
  const GemmShape shape{1, pixels, expanded, args.out_channels, false};
  pointwise_gemm<float, T>(shape, hidden, gate, weight, project, output, nullptr, parallel);
}

template <class T>
void run(const MBConvArgs& args) {
  // Whole images to every thread as long as all get one; the rest share their threads.
  const int64_t shared = args.in.count % args.parallel.threads;
  const int64_t own = args.in.count - shared;
  const Parallel alone{1, nullptr};
  parallel_for(args.parallel, own, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; n++) run_image<T>(args, n, alone);
  });
  for (int64_t n = own; n < args.in.count; n++) run_image<T>(args, n, args.parallel);
}

}  // namespace

void mbconv(const MBConvArgs& args) {
  args.dtype == DType::f32 ? run<float>(args) : run<bf16>(args);
}

}  // namespace EFFKERNELS_ISA
}  // namespace effkernels
