// Every CPU kernel, in every instruction set that this CPU has, against plain loops in double.
//
// Knows no torch, so that it also runs under an emulator of another architecture. A case calls the
// op of each instruction set twice: alone, and with its tasks in three ranges that run in reverse
// order, which must not change a bit. Memory around every tensor is NaN and must stay so; what is
// read there shows in the result.
//
// Prints a line per instruction set and op; exits with 1 if anything was wrong.
#include <array>
#include <cfloat>
#include <limits>

#include "training_cases.h"
#include "verify.h"

using namespace reference;

namespace {

// One function per op: its cases.

void depthwise_conv_cases(DType dtype) {
  for (const Window& w : kWindows) {
    for (int64_t channels : kChannels) {
      const Images in{pick({1, 2}), w.height, w.width, channels};
      const Values x = draw(dtype, in.count * in.size());
      Weights weight(channels, w.kernel * w.kernel, true);
      DrawnEpilogue epilogue(channels);
      Values want = convolve(x, in, w, weight.values, channels, 1);
      epilogue.apply(want);
      const Values want_mean = spatial_mean(want, in.count, channels);
      Tensor input(dtype, x), output(dtype, want.size()), mean(dtype, want_mean.size());
      std::vector<Expected> outputs = {sums(output, want, weight.depth)};
      const bool with_mean = coin();
      if (with_mean) outputs.push_back(sums(mean, want_mean, weight.depth));
      const DepthwiseConvArgs args{dtype,
                                   output.data(),
                                   with_mean ? mean.data() : nullptr,
                                   input.data(),
                                   in,
                                   w.out_height(),
                                   w.out_width(),
                                   weight.packed.floats(),
                                   w.geometry(),
                                   epilogue.pointers(),
                                   {}};
      verify("depthwise_conv", &Kernels::depthwise_conv, args, outputs,
             describe(dtype, in, w, channels));
    }
  }
}

void depthwise_conv_backward_cases(DType dtype) {
  for (const Window& w : kWindows) {
    for (int64_t channels : kChannels) {
      const Images in{pick({1, 2}), w.height, w.width, channels};
      const Geometry g = w.geometry();
      const int64_t taps = w.kernel * w.kernel, rows = w.out_height(), columns = w.out_width();
      const Values x = draw(dtype, in.count * in.size());
      const Values upstream = draw(dtype, in.count * rows * columns * channels);
      Weights weight(channels, taps, true);
      Values for_input(x.size()), for_weight(taps * channels);
      for (int64_t i = 0; i < static_cast<int64_t>(upstream.size()); i++) {
        const int64_t c = i % channels, ox = i / channels % columns;
        const int64_t oy = i / channels / columns % rows, n = i / channels / columns / rows;
        for (int64_t tap = 0; tap < taps; tap++) {
          const int64_t y = oy * g.stride_h + tap / w.kernel * g.dilation_h - g.top;
          const int64_t column = ox * g.stride_w + tap % w.kernel * g.dilation_w - g.left;
          if (y < 0 || y >= in.height || column < 0 || column >= in.width) continue;
          const int64_t at = ((n * in.height + y) * in.width + column) * channels + c;
          for_input[at] += upstream[i] * weight.values[c * taps + tap];
          for_weight[tap * channels + c] += upstream[i] * x[at];
        }
      }
      Tensor input(dtype, x), above(dtype, upstream), output(dtype, x.size());
      Tensor weight_out(DType::f32, for_weight.size());
      const int terms = static_cast<int>(in.count * rows * columns);
      const bool both = coin();
      std::vector<Expected> outputs = {sums(output, for_input, weight.depth)};
      if (both) outputs.push_back(sums(weight_out, for_weight, terms));
      const DepthwiseConvBackwardArgs args{dtype,
                                           output.data(),
                                           both ? weight_out.floats() : nullptr,
                                           above.data(),
                                           input.data(),
                                           in,
                                           rows,
                                           columns,
                                           weight.packed.floats(),
                                           g,
                                           {}};
      verify("depthwise_conv_backward", &Kernels::depthwise_conv_backward, args, outputs,
             describe(dtype, in, w, channels));
    }
  }
}

void pointwise_conv_cases(DType dtype) {
  const Window sizes[] = {{1, 1, 1, 1, 1, 0, 0, 0, 0},
                          {5, 7, 1, 1, 1, 0, 0, 0, 0},
                          {29, 19, 1, 1, 1, 0, 0, 0, 0}};  // more than a chunk of rows
  for (const Window& w : sizes) {
    for (int64_t channels : {1, 3, 8, 16, 17, 33, 300}) {
      for (int options = 0; options < 8; options++) {
        const bool gated = options & 1, with_residual = options & 2, with_mean = options & 4;
        const Images in{pick({1, 2}), w.height, w.width, channels};
        const int64_t out_channels = pick({1, 3, 8, 16, 17, 33});
        const Values x = draw(dtype, in.count * in.size());
        const Values gates = draw(DType::f32, in.count * channels);
        const int64_t size = in.count * in.pixels() * out_channels;
        Weights weight(out_channels, channels, false);
        DrawnEpilogue epilogue(out_channels, dtype, with_residual ? size : 0);
        Values gated_x = x;
        if (gated) multiply_gate(gated_x, gates, in.count, channels);
        Values want = convolve(gated_x, in, w, weight.values, out_channels, channels);
        epilogue.apply(want);
        const Values want_mean = spatial_mean(want, in.count, out_channels);
        Tensor input(dtype, x), gate(DType::f32, gates), output(dtype, size);
        Tensor mean(dtype, want_mean.size());
        std::vector<Expected> outputs = {sums(output, want, channels)};
        if (with_mean) outputs.push_back(sums(mean, want_mean, channels));
        const PointwiseConvArgs args{dtype,
                                     output.data(),
                                     with_mean ? mean.data() : nullptr,
                                     input.data(),
                                     in,
                                     out_channels,
                                     weight.packed.floats(),
                                     gated ? gate.floats() : nullptr,
                                     epilogue.pointers(),
                                     {}};
        verify("pointwise_conv", &Kernels::pointwise_conv, args, outputs,
               describe(dtype, in, w, out_channels));
      }
    }
  }
}

// NHWC images in NCHW order.
Values planes(const Values& images, const Images& in) {
  Values result;
  for (int64_t n = 0; n < in.count; n++) {
    for (int64_t c = 0; c < in.channels; c++) {
      for (int64_t p = 0; p < in.pixels(); p++) {
        result.push_back(images[(n * in.pixels() + p) * in.channels + c]);
      }
    }
  }
  return result;
}

void conv_cases(DType dtype) {
  for (const Window& w : kWindows) {
    for (int64_t channels : kChannels) {
      const Images in{pick({1, 2}), w.height, w.width, channels};
      const int64_t out_channels = pick({1, 3, 8, 16, 17, 33});
      const Values x = draw(dtype, in.count * in.size());
      const int64_t size = in.count * w.out_height() * w.out_width() * out_channels;
      Weights weight(out_channels, w.kernel * w.kernel * channels, false);
      DrawnEpilogue epilogue(out_channels, dtype, coin() ? size : 0);
      Values want = convolve(x, in, w, weight.values, out_channels, channels);
      epilogue.apply(want);
      const bool planar = coin();
      Tensor input(dtype, planar ? planes(x, in) : x), output(dtype, size);
      const ConvArgs args{dtype,
                          output.data(),
                          input.data(),
                          planar,
                          in,
                          w.out_height(),
                          w.out_width(),
                          out_channels,
                          weight.packed.floats(),
                          w.geometry(),
                          epilogue.pointers(),
                          {}};
      verify("conv", &Kernels::conv, args, {sums(output, want, weight.depth)},
             describe(dtype, in, w, out_channels));
    }
  }
}

// [K, taps, C] as [K, C, taps].
Values taps_last(const Values& weights, int64_t out_channels, int64_t channels) {
  Values result(weights.size());
  for (int64_t i = 0; i < out_channels * 9 * channels; i++) {
    const int64_t k = i / channels / 9, tap = i / channels % 9, c = i % channels;
    result[(k * channels + c) * 9 + tap] = weights[i];
  }
  return result;
}

// G g G' of 3x3 kernels [K, taps, C]: matrices [K, C], each in panels, for tiles of 2 x width.
Values winograd(const Values& weights, int64_t out_channels, int64_t channels, int64_t width) {
  const auto axis = [](int64_t outputs) -> std::vector<std::array<double, 3>> {
    if (outputs == 2) return {{1, 0, 0}, {0.5, 0.5, 0.5}, {0.5, -0.5, 0.5}, {0, 0, 1}};
    std::vector<std::array<double, 3>> rows = {{1 / (0.5625 * 2.25), 0, 0}};
    for (double p : {0.75, -0.75, 1.5, -1.5}) {
      const double q = p * p == 0.5625 ? 2.25 : 0.5625, norm = 2 * p * p * (p * p - q);
      rows.push_back({1 / norm, p / norm, p * p / norm});
    }
    rows.push_back({0, 0, 1});
    return rows;
  };
  const auto down = axis(2), across = axis(width);
  const int64_t matrix = round_up(out_channels, kPanel) * channels;
  Values result(down.size() * across.size() * matrix);
  for (size_t m = 0; m < down.size() * across.size(); m++) {
    for (int64_t k = 0; k < out_channels; k++) {
      for (int64_t c = 0; c < channels; c++) {
        double sum = 0;
        for (int64_t tap = 0; tap < 9; tap++) {
          sum += down[m / across.size()][tap / 3] * across[m % across.size()][tap % 3] *
                 weights[(k * 9 + tap) * channels + c];
        }
        result[m * matrix + (k / kPanel * channels + c) * kPanel + k % kPanel] = sum;
      }
    }
  }
  return result;
}

void winograd_cases(DType dtype) {
  for (const Window& w : kWindows) {
    if (w.kernel != 3 || w.stride != 1 || w.dilation != 1) continue;
    for (int64_t channels : kChannels) {
      for (int64_t width : {2, 4}) {
        const Images in{pick({1, 2}), w.height, w.width, channels};
        const int64_t out_channels = pick({1, 3, 8, 16, 17, 33});
        const Values x = draw(dtype, in.count * in.size());
        const int64_t size = in.count * w.out_height() * w.out_width() * out_channels;
        Weights weight(out_channels, 9 * channels, false);
        Tensor given(DType::f32, taps_last(weight.values, out_channels, channels));
        Tensor transformed(DType::f32, winograd(weight.values, out_channels, channels, width));
        DrawnEpilogue epilogue(out_channels, dtype, coin() ? size : 0);
        Values want = convolve(x, in, w, weight.values, out_channels, channels);
        epilogue.apply(want);
        Tensor input(dtype, x), output(dtype, size);
        const ConvArgs args{dtype,
                            output.data(),
                            input.data(),
                            false,
                            in,
                            w.out_height(),
                            w.out_width(),
                            out_channels,
                            given.floats(),
                            w.geometry(),
                            epilogue.pointers(),
                            {},
                            transformed.floats(),
                            width};
        verify("conv", &Kernels::conv, args, {sums(output, want, weight.depth)},
               describe(dtype, in, w, out_channels));
      }
    }
  }
}

void squeeze_excite_cases(DType dtype) {
  for (const Window& w : {kWindows[7], kWindows[0], kWindows[8]}) {
    for (int64_t channels : kChannels) {
      const Images in{pick({1, 2, 4}), w.height, w.width, channels};
      const Values x = draw(dtype, in.count * in.size());
      DrawnGate drawn(channels);
      const Values means = spatial_mean(x, in.count, channels);
      const Values gates = drawn.apply(means);
      const int64_t depth = channels + drawn.reduced;
      Values want = x;
      multiply_gate(want, gates, in.count, channels);
      Tensor input(dtype, x), output(dtype, x.size());
      const std::string what = describe(dtype, in, w, channels);
      verify("squeeze_excite", &Kernels::squeeze_excite,
             SqueezeExciteArgs{dtype, output.data(), input.data(), in, drawn.pointers(), {}},
             {sums(output, want, depth)}, what);
      Tensor mean(DType::f32, means), gate(DType::f32, gates.size());
      verify("squeeze_excite_gate", &Kernels::squeeze_excite_gate,
             SqueezeExciteGateArgs{gate.floats(), mean.floats(), in.count, drawn.pointers(), {}},
             {sums(gate, gates, depth)}, what);
    }
  }
}

// Special values beside ordinary ones, in whole vectors and in the last, shorter one.
void squeeze_excite_backward_cases(DType dtype) {
  const Window many{29, 19, 1, 1, 1, 0, 0, 0, 0};
  for (const Window& w : {kWindows[7], kWindows[0], kWindows[8], many}) {
    for (int64_t channels : {1, 3, 8, 16, 17, 33, 67}) {
      const Images in{pick({1, 2, 4, 14}), w.height, w.width, channels};
      const int64_t size = in.count * in.size(), vectors = in.count * channels;
      const double pixels = static_cast<double>(in.pixels());
      const Values x = draw(dtype, size, 1.0, 0.3), upstream = draw(dtype, size, 1.0, 0.2);
      DrawnGate drawn(channels);
      const Values means = spatial_mean(x, in.count, channels), gates = drawn.apply(means);
      Values products = x;
      for (int64_t i = 0; i < size; i++) products[i] *= upstream[i];
      Values for_gate = spatial_mean(products, in.count, channels);
      for (double& value : for_gate) value *= pixels;
      DrawnGate::Gradients due = drawn.differentiate(means, for_gate);
      Values want = upstream;
      multiply_gate(want, gates, in.count, channels);
      for (int64_t i = 0; i < size; i++) {
        want[i] += due.mean[i / in.size() * channels + i % channels] / pixels;
      }
      const bool with_weights = coin(), with_biases = coin(), with_input = coin();
      Tensor reduce(DType::f32, due.reduce.size()), expand(DType::f32, due.expand.size());
      Tensor reduce_bias(DType::f32, drawn.reduced), expand_bias(DType::f32, channels);
      const int64_t depth = in.pixels() + channels + drawn.reduced + in.count;
      std::vector<Expected> outputs;
      const auto expect_weights = [&] {
        if (with_weights) {
          outputs.push_back(sums(reduce, due.reduce, depth));
          outputs.push_back(sums(expand, due.expand, depth));
        }
        if (with_biases) {
          outputs.push_back(sums(reduce_bias, due.reduce_bias, depth));
          outputs.push_back(sums(expand_bias, due.expand_bias, depth));
        }
      };
      const SqueezeExciteGradients gradients{
          with_weights ? reduce.floats() : nullptr, with_biases ? reduce_bias.floats() : nullptr,
          with_weights ? expand.floats() : nullptr, with_biases ? expand_bias.floats() : nullptr};
      const std::string what = describe(dtype, in, w, channels);
      Tensor input(dtype, x), above(dtype, upstream), output(dtype, size);
      if (with_input) outputs.push_back(sums(output, want, depth));
      expect_weights();
      verify("squeeze_excite_backward", &Kernels::squeeze_excite_backward,
             SqueezeExciteBackwardArgs{dtype,
                                       with_input ? output.data() : nullptr,
                                       above.data(),
                                       input.data(),
                                       in,
                                       drawn.pointers(),
                                       gradients,
                                       {}},
             outputs, what);

      const Values above_gate = draw(DType::f32, vectors);
      due = drawn.differentiate(means, above_gate);
      Tensor mean(DType::f32, means), gate(DType::f32, above_gate), for_mean(DType::f32, vectors);
      outputs.clear();
      if (with_input) outputs.push_back(sums(for_mean, due.mean, depth));
      expect_weights();
      verify("squeeze_excite_gate_backward", &Kernels::squeeze_excite_gate_backward,
             SqueezeExciteGateBackwardArgs{with_input ? for_mean.floats() : nullptr,
                                           gate.floats(),
                                           mean.floats(),
                                           in.count,
                                           drawn.pointers(),
                                           gradients,
                                           {}},
             outputs, what);
    }
  }
}

void silu_cases(DType dtype) {
  const double infinity = std::numeric_limits<double>::infinity();
  Values special = {infinity, 0.0, NAN, 1e-39, 1e-30, 1e-4, 3.0, 6.0, 1000.0, 3e38, FLT_MAX};
  for (double x = 86.0; x <= 111.0; x += 0.25) special.push_back(x);
  const size_t positive = special.size();
  for (size_t i = 0; i < positive; i++) special.push_back(-special[i]);
  Values sizes;
  for (int size = 1; size <= 40; size++) sizes.push_back(size);
  sizes.push_back(3 * 4096 + 5);
  for (Activation activation :
       {Activation::none, Activation::relu, Activation::relu6, Activation::silu,
        Activation::hard_swish, Activation::sigmoid, Activation::hard_sigmoid}) {
    size_t next = 0;
    for (double size : sizes) {
      Values x = draw(dtype, static_cast<int64_t>(size), 90.0 * uniform(0.0, 1.0)), want;
      for (double& value : x) {
        if (coin()) value = stored(dtype, special[next++ % special.size()]);
        want.push_back(activate(activation, value));
      }
      Tensor input(dtype, x), output(dtype, x.size());
      const SiluArgs args{dtype, output.data(), input.data(), nullptr, input.size(), activation,
                          {}};
      const std::string what = "activation " + std::to_string(static_cast<int>(activation)) +
                               " of " + std::to_string(x.size()) +
                               (dtype == DType::f32 ? " f32" : " bf16");
      verify("silu", &Kernels::silu, args, {{&output, want, 1e-6, FLT_MIN}}, what);

      Values points = draw(dtype, input.size(), 12.0), upstream = draw(dtype, input.size());
      for (size_t i = 0; i < points.size(); i++) {
        want[i] = upstream[i] * slope(activation, points[i]);
      }
      Tensor point(dtype, points), above(dtype, upstream);
      Values sums;
      for (size_t i = 0; i < points.size(); i++) {
        sums.push_back(activate(activation, points[i] + upstream[i]));
      }
      verify(
          "silu", &Kernels::silu,
          SiluArgs{dtype, output.data(), point.data(), above.data(), input.size(), activation, {}},
          {{&output, sums, 1e-6, 1e-6}}, what + " with a residual");
      verify("silu_backward", &Kernels::silu_backward,
             SiluBackwardArgs{
                 dtype, output.data(), above.data(), point.data(), input.size(), activation, {}},
             {{&output, want, 1e-6, 1e-6}}, what);
    }
  }
}

// Sums that are exact in float32: halfway between two bf16 they go to the even one, and a NaN
// whose bits are all set stays one.
void rounding_cases() {
  const int64_t channels = 33;
  const Window w{16, 8, 1, 1, 1, 0, 0, 0, 0};
  const Images in{1, w.height, w.width, channels};
  Values x, want;
  Tensor bias(DType::f32, channels);  // all bits are set
  for (int64_t c = 0; c < channels; c++) {
    if (c % 3 != 0) bias.floats()[c] = c % 3 == 1 ? 0.5f : -0.5f;
  }
  for (int64_t i = 0; i < in.size(); i++) {
    x.push_back((128.0 + i / channels) * (i % 2 == 0 ? 1.0 : -1.0));
    want.push_back(x.back() + bias[i % channels]);
  }
  Tensor input(DType::bf16, x), output(DType::bf16, in.size());
  Tensor weight(DType::f32, Values(round_up(channels, kPanel), 1.0));
  Epilogue epilogue;
  epilogue.bias = bias.floats();
  const DepthwiseConvArgs args{DType::bf16,  output.data(), nullptr, input.data(),
                               in,           w.height,      w.width, weight.floats(),
                               w.geometry(), epilogue,      {}};
  verify("depthwise_conv", &Kernels::depthwise_conv, args, {{&output, want, 0.0, 0.0}},
         "rounding to bf16");
}

void batch_norm_act_cases(DType dtype) {
  const Window one{1, 1, 1, 1, 1, 0, 0, 0, 0}, many{29, 19, 1, 1, 1, 0, 0, 0, 0};
  for (const Window& w : {one, kWindows[0], many}) {
    for (int64_t channels : kChannels) {
      for (bool training : {true, false}) {
        const Images in{w.height == 1 ? 1 : pick({1, 2}), w.height, w.width, channels};
        const int64_t size = in.count * in.size(), pixels = size / channels;
        const Values x = draw(dtype, size, 1.0, 2.0);
        DrawnEpilogue affine(channels, dtype, coin() ? size : 0);
        Values means = draw(DType::f32, channels), vars = draw(DType::f32, channels, 0.5, 1.0);
        if (training) {
          means.assign(channels, 0.0);
          vars.assign(channels, 0.0);
          for (int64_t i = 0; i < size; i++) means[i % channels] += x[i] / pixels;
          for (int64_t i = 0; i < size; i++) {
            vars[i % channels] +=
                (x[i] - means[i % channels]) * (x[i] - means[i % channels]) / pixels;
          }
        }
        const double eps = 1e-3;
        Values want(size);
        for (int64_t i = 0; i < size; i++) {
          want[i] = (x[i] - means[i % channels]) / std::sqrt(vars[i % channels] + eps);
        }
        affine.apply(want);
        Tensor input(dtype, x), output(dtype, size), mean(DType::f32, means), var(DType::f32, vars);
        std::vector<Expected> outputs = {sums(output, want, 64)};
        if (training) {
          outputs.push_back(sums(mean, means, 64));
          outputs.push_back(sums(var, vars, 64));
        }
        const Epilogue epilogue = affine.pointers();
        const BatchNormActArgs args{dtype,
                                    output.data(),
                                    mean.floats(),
                                    var.floats(),
                                    input.data(),
                                    in,
                                    epilogue.scale,
                                    epilogue.bias,
                                    epilogue.residual,
                                    training,
                                    eps,
                                    epilogue.activation,
                                    {}};
        verify(training ? "batch_norm_act, training" : "batch_norm_act", &Kernels::batch_norm_act,
               args, outputs, describe(dtype, in, w, channels));
      }
    }
  }
}

void batch_norm_act_backward_cases(DType dtype) {
  const Window few{3, 5, 1, 1, 1, 0, 0, 0, 0}, many{29, 19, 1, 1, 1, 0, 0, 0, 0};
  for (const Window& w : {few, many}) {
    for (int64_t channels : kChannels) {
      for (bool training : {true, false}) {
        const Images in{pick({1, 2}), w.height, w.width, channels};
        const int64_t size = in.count * in.size();
        const double pixels = static_cast<double>(size) / channels, eps = 1e-3;
        const Values x = draw(dtype, size, 1.0, 0.5), upstream = draw(dtype, size, 1.0, 0.2);
        DrawnEpilogue affine(channels, dtype, coin() ? size : 0);
        Values means = draw(DType::f32, channels), vars = draw(DType::f32, channels, 0.2, 1.0);
        for (double& v : vars) v = std::fabs(v) + 0.1;
        Tensor mean(DType::f32, means), var(DType::f32, vars);
        Values t(size), sum(channels), product(channels), r(channels), factor(channels);
        for (int64_t c = 0; c < channels; c++) {
          r[c] = 1.0 / std::sqrt(static_cast<float>(vars[c]) + eps);
          factor[c] = r[c] * (affine.has_scale ? affine.scale[c] : 1.0);
        }
        for (int64_t i = 0; i < size; i++) {
          const int64_t c = i % channels;
          double at = (x[i] - means[c]) * factor[c] + (affine.has_bias ? affine.bias[c] : 0.0);
          if (!affine.residual.empty()) at += affine.residual[i];
          t[i] = upstream[i] * slope(affine.activation, at);
          sum[c] += t[i];
          product[c] += t[i] * (x[i] - means[c]);
        }
        Values want(size), for_weight(channels), for_mean(channels), for_var(channels);
        for (int64_t c = 0; c < channels; c++) {
          for_weight[c] = r[c] * product[c];
          for_mean[c] = -factor[c] * sum[c];
          for_var[c] = -0.5 * factor[c] * r[c] * r[c] * product[c];
        }
        for (int64_t i = 0; i < size; i++) {
          const int64_t c = i % channels;
          const double rest =
              sum[c] / pixels + (x[i] - means[c]) * r[c] * r[c] * product[c] / pixels;
          want[i] = factor[c] * (t[i] - (training ? rest : 0.0));
        }
        const bool with_residual = coin(), with_parameters = coin();
        Tensor input(dtype, x), above(dtype, upstream), output(dtype, size), other(dtype, size);
        Tensor weight_out(DType::f32, channels), bias_out(DType::f32, channels);
        Tensor mean_out(DType::f32, channels), var_out(DType::f32, channels);
        const int terms = static_cast<int>(size / channels);
        std::vector<Expected> outputs = {sums(output, want, 64)};
        if (with_residual) outputs.push_back(sums(other, t, 64));
        if (with_parameters) {
          outputs.push_back(sums(weight_out, for_weight, terms));
          outputs.push_back(sums(bias_out, sum, terms));
          outputs.push_back(sums(mean_out, for_mean, terms));
          outputs.push_back(sums(var_out, for_var, terms));
        }
        const Epilogue epilogue = affine.pointers();
        const BatchNormActBackwardArgs args{dtype,
                                            output.data(),
                                            with_residual ? other.data() : nullptr,
                                            with_parameters ? weight_out.floats() : nullptr,
                                            with_parameters ? bias_out.floats() : nullptr,
                                            with_parameters ? mean_out.floats() : nullptr,
                                            with_parameters ? var_out.floats() : nullptr,
                                            above.data(),
                                            input.data(),
                                            in,
                                            mean.floats(),
                                            var.floats(),
                                            epilogue.scale,
                                            epilogue.bias,
                                            epilogue.residual,
                                            nullptr,
                                            nullptr,
                                            training,
                                            eps,
                                            epilogue.activation,
                                            {}};
        verify("batch_norm_act_backward", &Kernels::batch_norm_act_backward, args, outputs,
               describe(dtype, in, w, channels));
      }
    }
  }
}

void mbconv_cases(DType dtype) {
  for (const Window& w : kWindows) {
    for (int options = 0; options < 8; options++) {
      const bool expands = options & 1, gated = options & 2, with_residual = options & 4;
      const Images in{pick({1, 2, 4}), w.height, w.width, pick({1, 3, 8, 17})};
      const int64_t expanded = expands ? pick({8, 16, 33, 48}) : in.channels;
      const int64_t out_channels = pick({1, 3, 8, 16, 17, 33});
      const int64_t pixels = w.out_height() * w.out_width();
      const Window point{w.height, w.width, 1, 1, 1, 0, 0, 0, 0};
      const Window out_point{w.out_height(), w.out_width(), 1, 1, 1, 0, 0, 0, 0};
      const Values x = draw(dtype, in.count * in.size());
      Weights expand(expanded, in.channels, false), taps(expanded, w.kernel * w.kernel, true);
      Weights project(out_channels, expanded, false);
      DrawnEpilogue after_expand(expanded), after_taps(expanded);
      DrawnEpilogue after_project(out_channels, dtype,
                                  with_residual ? in.count * pixels * out_channels : 0);
      DrawnGate gate(expanded);
      Values hidden = x;
      if (expands) {
        hidden = convolve(x, in, point, expand.values, expanded, in.channels);
        after_expand.apply(hidden);
      }
      const Images wide{in.count, in.height, in.width, expanded};
      hidden = convolve(hidden, wide, w, taps.values, expanded, 1);
      after_taps.apply(hidden);
      if (gated) {
        multiply_gate(hidden, gate.apply(spatial_mean(hidden, in.count, expanded)), in.count,
                      expanded);
      }
      const Images narrow{in.count, w.out_height(), w.out_width(), expanded};
      Values want = convolve(hidden, narrow, out_point, project.values, out_channels, expanded);
      after_project.apply(want);
      Tensor input(dtype, x), output(dtype, want.size());
      const MBConvArgs args{dtype,
                            output.data(),
                            input.data(),
                            in,
                            expanded,
                            expands ? expand.packed.floats() : nullptr,
                            after_expand.pointers(),
                            taps.packed.floats(),
                            w.geometry(),
                            after_taps.pointers(),
                            gated,
                            gate.pointers(),
                            project.packed.floats(),
                            after_project.pointers(),
                            w.out_height(),
                            w.out_width(),
                            out_channels,
                            {}};
      // Errors of one step pass through the next ones.
      const int64_t depth = 4 * (in.channels + taps.depth + 2 * expanded);
      const std::string what = describe(dtype, in, w, out_channels) + ", options " +
                               std::to_string(options) + ", expanded " + std::to_string(expanded);
      verify("mbconv", &Kernels::mbconv, args, {sums(output, want, depth)}, what);
      if (expands || gated) continue;
      verify("depthwise_separable_conv", &Kernels::depthwise_separable_conv, args,
             {sums(output, want, depth)}, what);
    }
  }
}

}  // namespace

int main() {
  for (DType dtype : {DType::f32, DType::bf16}) {
    depthwise_conv_cases(dtype);
    depthwise_conv_backward_cases(dtype);
    pointwise_conv_cases(dtype);
    conv_cases(dtype);
    winograd_cases(dtype);
    squeeze_excite_cases(dtype);
    squeeze_excite_backward_cases(dtype);
    silu_cases(dtype);
    batch_norm_act_cases(dtype);
    batch_norm_act_backward_cases(dtype);
    mbconv_cases(dtype);
    training_product_cases(dtype);
    training_depthwise_cases(dtype);
  }
  rounding_cases();
  int failures = 0;
  for (const auto& [names, tally] : tallies) {
    std::printf("%-8s %-25s %4d cases, %d wrong; float32 error at most %.2f of what is allowed\n",
                names.first.c_str(), names.second.c_str(), tally.cases, tally.failures,
                tally.worst);
    failures += tally.failures;
  }
  return failures == 0 ? 0 : 1;
}
