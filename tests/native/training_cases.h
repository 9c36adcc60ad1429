// The cases of csrc/mbconv_training: every stage of a block in training by itself.
#pragma once

#include "mbconv_training/mbconv_training.h"
#include "verify.h"

namespace reference {

struct DrawnNorm {
  Values mean, var, weight, bias;
  Activation activation;
  Tensor tensors[4];

  DrawnNorm(int64_t channels, Activation drawn)
      : mean(draw(DType::f32, channels)),
        var(draw(DType::f32, channels, 0.5, 1.0)),
        weight(draw(DType::f32, channels, 0.5, 1.0)),
        bias(draw(DType::f32, channels)),
        activation(drawn),
        tensors{{DType::f32, mean}, {DType::f32, var}, {DType::f32, weight}, {DType::f32, bias}} {}

  static constexpr double kEps = 1e-3;
  TrainingNorm pointers() {
    return {
        tensors[0].floats(), tensors[1].floats(), tensors[2].floats(), tensors[3].floats(), kEps,
        activation};
  }
  double inverse(int64_t c) const { return 1.0 / std::sqrt(var[c] + kEps); }
  double before(int64_t c, double x) const {  // of the activation
    return (x - mean[c]) * inverse(c) * weight[c] + bias[c];
  }
  double operator()(int64_t c, double x) const { return activate(activation, before(c, x)); }
  double slope_at(int64_t c, double x) const { return slope(activation, before(c, x)); }
};

// Factor, slope and constant of a BatchNorm's backward pass, from its sums over n pixels.
inline void backward_numbers(const DrawnNorm& norm, int64_t channels, const Values& t,
                             const Values& product, double n, Values& numbers, Values& weight,
                             Values& bias) {
  numbers.assign(3 * channels, 0.0);
  for (int64_t c = 0; c < channels; c++) {
    const double r = norm.inverse(c), w = norm.weight[c];
    numbers[c] = w * r;
    numbers[channels + c] = -w * r * r * r * product[c] / n;
    numbers[2 * channels + c] = -w * r * t[c] / n;
    weight.push_back(r * product[c]);
    bias.push_back(t[c]);
  }
}

// Statistics are those of the stored values, each of which may be one rounding away.
inline Expected stored_sums(Tensor& actual, const Values& values, int64_t depth, DType dtype) {
  Expected expected = sums(actual, values, depth);
  if (dtype == DType::bf16) expected.relative = expected.absolute = 0.01;
  return expected;
}

inline void moments_of(const Values& values, int64_t channels, DType dtype, Values& mean,
                       Values& var) {
  const int64_t pixels = static_cast<int64_t>(values.size()) / channels;
  mean.assign(channels, 0.0);
  var.assign(channels, 0.0);
  for (size_t i = 0; i < values.size(); i++) {
    mean[i % channels] += stored(dtype, values[i]) / pixels;
  }
  for (size_t i = 0; i < values.size(); i++) {
    const double d = stored(dtype, values[i]) - mean[i % channels];
    var[i % channels] += d * d / pixels;
  }
}

inline void training_product_cases(DType dtype) {
  const Window sizes[] = {{5, 7, 1, 1, 1, 0, 0, 0, 0}, {29, 19, 1, 1, 1, 0, 0, 0, 0}};
  for (const Window& w : sizes) {
    for (int64_t channels : kChannels) {
      for (int options = 0; options < 4; options++) {
        const bool normed = options & 1, gated = options == 3, kept = options & 2;
        const Images in{pick({1, 3}), w.height, w.width, channels};
        const int64_t outs = pick({1, 3, 16, 17, 33, 40}), pixels = in.count * in.pixels();
        const Values x = draw(dtype, pixels * channels);
        const Values gates = draw(DType::f32, in.count * channels);
        const Values keeps = draw(DType::f32, in.count);
        DrawnNorm norm(channels, pick_activation()), after(outs, Activation::none);
        Weights weight(outs, channels, false), transposed(channels, outs, false);
        Tensor input(dtype, x), gate(DType::f32, gates), keep(DType::f32, keeps);
        const TrainingNorm no_norm{};
        const std::string what = "product " + describe(dtype, in, w, outs);
        Values a = x;  // what enters the product
        for (int64_t i = 0; i < pixels * channels; i++) {
          const int64_t c = i % channels, n = i / in.size();
          if (normed) a[i] = norm(c, a[i]);
          if (gated) a[i] *= gates[n * channels + c];
        }
        const Values want = convolve(a, in, w, weight.values, outs, channels);
        Values want_mean, want_var;
        moments_of(want, outs, dtype, want_mean, want_var);
        Tensor output(dtype, want.size()), mean(DType::f32, outs), var(DType::f32, outs);
        verify("mbconv_training", &Kernels::mbconv_training_product,
               TrainingProductArgs{dtype,
                                   output.data(),
                                   mean.floats(),
                                   var.floats(),
                                   input.data(),
                                   in,
                                   normed ? norm.pointers() : no_norm,
                                   gated ? gate.floats() : nullptr,
                                   weight.packed.floats(),
                                   outs,
                                   {}},
               {sums(output, want, 4 * channels), stored_sums(mean, want_mean, 4 * channels, dtype),
                stored_sums(var, want_var, 16 * channels, dtype)},
               what);

        // Backward
        const Values upstream = draw(dtype, pixels * outs), z = draw(dtype, pixels * outs);
        const Values rest = draw(dtype, pixels * channels);
        const Values numbers = draw(DType::f32, 3 * outs);
        Values g(pixels * outs), t_sum(outs), product(outs);
        for (int64_t i = 0; i < pixels * outs; i++) {
          const int64_t c = i % outs, n = i / outs / in.pixels();
          const double t = upstream[i] * (kept ? keeps[n] : 1.0), d = z[i] - after.mean[c];
          t_sum[c] += t;
          product[c] += t * d;
          g[i] = numbers[c] * t + numbers[outs + c] * d + numbers[2 * outs + c];
        }
        Values due_numbers, due_weight, due_bias;
        backward_numbers(after, outs, t_sum, product, pixels, due_numbers, due_weight, due_bias);
        Tensor above(dtype, upstream), raw(dtype, z), coefficients(DType::f32, 3 * outs);
        Tensor for_norm(DType::f32, outs), for_bias(DType::f32, outs);
        verify("mbconv_training", &Kernels::mbconv_training_norm_backward,
               TrainingNormBackwardArgs{dtype,
                                        coefficients.floats(),
                                        for_norm.floats(),
                                        for_bias.floats(),
                                        above.data(),
                                        raw.data(),
                                        {in.count, in.height, in.width, outs},
                                        after.pointers(),
                                        kept ? keep.floats() : nullptr,
                                        {}},
               {sums(coefficients, due_numbers, 16), sums(for_norm, due_weight, pixels),
                sums(for_bias, due_bias, pixels)},
               what + ", norm backward");

        Values due(pixels * channels), for_weight(outs * channels);
        Values due_sums(in.count * kProductSums * channels);
        for (int64_t p = 0; p < pixels; p++) {
          for (int64_t c = 0; c < channels; c++) {
            double u = normed ? 0.0 : rest[p * channels + c];
            for (int64_t k = 0; k < outs; k++) {
              u += g[p * outs + k] * transposed.values[c * outs + k];
              for_weight[k * channels + c] += g[p * outs + k] * a[p * channels + c];
            }
            due[p * channels + c] = u;
            const double value = x[p * channels + c], s = norm.slope_at(c, value);
            const double d = value - norm.mean[c], us = stored(dtype, u) * s;
            const double terms[kProductSums] = {stored(dtype, u) * norm(c, value), us, s, us * d,
                                                s * d};
            double* total = &due_sums[p / in.pixels() * kProductSums * channels + c];
            for (int64_t i = 0; i < kProductSums; i++) total[i * channels] += terms[i];
          }
        }
        Tensor gradient(dtype, due.size()), weight_out(DType::f32, for_weight.size());
        Tensor sums_out(DType::f32, due_sums.size()), residual(dtype, rest);
        Tensor given(DType::f32, numbers);
        const int64_t depth = 16 * (outs + pixels);
        std::vector<Expected> outputs = {sums(gradient, due, 16 * outs),
                                         sums(weight_out, for_weight, depth)};
        if (normed) outputs.push_back(stored_sums(sums_out, due_sums, depth * outs, dtype));
        if (normed && dtype == DType::bf16) outputs.back().absolute = 0.02 * in.pixels();
        verify("mbconv_training", &Kernels::mbconv_training_product_backward,
               TrainingProductBackwardArgs{dtype,
                                           gradient.data(),
                                           weight_out.floats(),
                                           normed ? sums_out.floats() : nullptr,
                                           above.data(),
                                           raw.data(),
                                           after.tensors[0].floats(),
                                           given.floats(),
                                           kept ? keep.floats() : nullptr,
                                           input.data(),
                                           in,
                                           normed ? norm.pointers() : no_norm,
                                           gated ? gate.floats() : nullptr,
                                           transposed.packed.floats(),
                                           normed ? nullptr : residual.data(),
                                           outs,
                                           {}},
               outputs, what + ", backward");

        // The passes over one tensor
        if (!normed) continue;
        Values pooled(in.count * channels), finished(pixels * channels);
        DrawnNorm last(channels, Activation::none);
        for (int64_t i = 0; i < pixels * channels; i++) {
          const int64_t c = i % channels, n = i / in.size();
          pooled[n * channels + c] += norm(c, x[i]) / in.pixels();
          finished[i] = last(c, x[i]) * (kept ? keeps[n] : 1.0) + rest[i];
        }
        Tensor pool(DType::f32, pooled.size()), finish(dtype, finished.size());
        verify("mbconv_training", &Kernels::mbconv_training_pool,
               TrainingPoolArgs{dtype, pool.floats(), input.data(), in, norm.pointers(), {}},
               {sums(pool, pooled, 16)}, what + ", pool");
        verify("mbconv_training", &Kernels::mbconv_training_finish,
               TrainingFinishArgs{dtype,
                                  finish.data(),
                                  input.data(),
                                  in,
                                  last.pointers(),
                                  kept ? keep.floats() : nullptr,
                                  residual.data(),
                                  {}},
               {sums(finish, finished, 16)}, what + ", finish");
      }
    }
  }
}

inline void training_depthwise_cases(DType dtype) {
  for (const Window& w : kWindows) {
    for (int64_t channels : kChannels) {
      const bool normed = coin(), gated = coin();
      const Images in{pick({1, 2}), w.height, w.width, channels};
      const Geometry g = w.geometry();
      const int64_t taps = w.kernel * w.kernel, rows = w.out_height(), columns = w.out_width();
      const int64_t pixels = in.count * rows * columns, all = in.count * in.pixels();
      const Activation activation = pick_activation();
      DrawnNorm norm(channels, activation), after(channels, activation);
      const TrainingNorm no_norm{};
      const Values x = draw(dtype, all * channels), z = draw(dtype, pixels * channels);
      const Values upstream = draw(dtype, pixels * channels), rest = draw(dtype, all * channels);
      const Values gates = draw(DType::f32, in.count * channels);
      const Values offsets = draw(DType::f32, in.count * channels);
      Weights weight(channels, taps, true), reversed(channels, taps, true);
      Values a = x;
      for (int64_t i = 0; normed && i < all * channels; i++) a[i] = norm(i % channels, x[i]);
      const Values want = convolve(a, in, w, weight.values, channels, 1);
      Values want_mean, want_var;
      moments_of(want, channels, dtype, want_mean, want_var);
      Tensor input(dtype, x), output(dtype, want.size());
      Tensor mean(DType::f32, channels), var(DType::f32, channels);
      const std::string what = "depthwise " + describe(dtype, in, w, channels);
      verify("mbconv_training", &Kernels::mbconv_training_depthwise,
             TrainingDepthwiseArgs{dtype,
                                   output.data(),
                                   mean.floats(),
                                   var.floats(),
                                   input.data(),
                                   in,
                                   normed ? norm.pointers() : no_norm,
                                   weight.packed.floats(),
                                   g,
                                   rows,
                                   columns,
                                   {}},
             {sums(output, want, 16 * taps), stored_sums(mean, want_mean, 16 * taps, dtype),
              stored_sums(var, want_var, 64 * taps, dtype)},
             what);

      // Backward: `sums` are made up, so that the coefficients are simple numbers of them.
      const Values given = draw(DType::f32, in.count * kProductSums * channels);
      Values t_sum(channels), product(channels);
      for (int64_t n = 0; n < in.count; n++) {
        for (int64_t c = 0; c < channels; c++) {
          const double gate = gated ? gates[n * channels + c] : 1.0;
          const double offset = gated ? offsets[n * channels + c] : 0.0;
          const double* s = &given[n * kProductSums * channels + c];
          t_sum[c] += gate * s[channels] + offset * s[2 * channels];
          product[c] += gate * s[3 * channels] + offset * s[4 * channels];
        }
      }
      Values numbers, for_after, for_after_bias;
      backward_numbers(after, channels, t_sum, product, pixels, numbers, for_after, for_after_bias);
      Values due(all * channels), for_taps(taps * channels);
      for (int64_t i = 0; i < pixels * channels; i++) {
        const int64_t c = i % channels, ox = i / channels % columns;
        const int64_t oy = i / channels / columns % rows, n = i / channels / columns / rows;
        double t = upstream[i];
        if (gated) t = t * gates[n * channels + c] + offsets[n * channels + c];
        const double d = z[i] - after.mean[c];
        const double value = numbers[c] * t * after.slope_at(c, z[i]) + numbers[channels + c] * d +
                             numbers[2 * channels + c];
        for (int64_t tap = 0; tap < taps; tap++) {
          const int64_t y = oy * g.stride_h + tap / w.kernel * g.dilation_h - g.top;
          const int64_t column = ox * g.stride_w + tap % w.kernel * g.dilation_w - g.left;
          if (y < 0 || y >= in.height || column < 0 || column >= in.width) continue;
          const int64_t at = ((n * in.height + y) * in.width + column) * channels + c;
          due[at] += value * reversed.values[c * taps + taps - 1 - tap];
          for_taps[tap * channels + c] += value * a[at];
        }
      }
      Values ts(channels), products(channels), before, for_norm, for_bias;
      for (int64_t i = 0; i < all * channels; i++) {
        const int64_t c = i % channels;
        if (normed) due[i] *= norm.slope_at(c, x[i]);
        ts[c] += due[i];
        products[c] += due[i] * (x[i] - norm.mean[c]);
        if (!normed) due[i] += rest[i];
      }
      backward_numbers(norm, channels, ts, products, all, before, for_norm, for_bias);
      Tensor above(dtype, upstream), raw(dtype, z), sums_in(DType::f32, given);
      Tensor gate(DType::f32, gates), offset(DType::f32, offsets), residual(dtype, rest);
      Tensor gradient(dtype, due.size()), taps_out(DType::f32, for_taps.size());
      Tensor coefficients(DType::f32, 3 * channels), norm_out(DType::f32, channels);
      Tensor bias_out(DType::f32, channels), after_out(DType::f32, channels);
      Tensor after_bias_out(DType::f32, channels);
      const int64_t depth = 64 * (taps + all);
      std::vector<Expected> outputs = {
          sums(gradient, due, 64 * taps), sums(taps_out, for_taps, depth),
          sums(after_out, for_after, 16), sums(after_bias_out, for_after_bias, 16)};
      if (normed) {
        outputs.push_back(sums(coefficients, before, depth));
        outputs.push_back(sums(norm_out, for_norm, depth));
        outputs.push_back(sums(bias_out, for_bias, depth));
      }
      verify("mbconv_training", &Kernels::mbconv_training_depthwise_backward,
             TrainingDepthwiseBackwardArgs{dtype,
                                           gradient.data(),
                                           taps_out.floats(),
                                           normed ? coefficients.floats() : nullptr,
                                           normed ? norm_out.floats() : nullptr,
                                           normed ? bias_out.floats() : nullptr,
                                           after_out.floats(),
                                           after_bias_out.floats(),
                                           above.data(),
                                           raw.data(),
                                           after.pointers(),
                                           sums_in.floats(),
                                           gated ? gate.floats() : nullptr,
                                           gated ? offset.floats() : nullptr,
                                           input.data(),
                                           in,
                                           normed ? norm.pointers() : no_norm,
                                           reversed.packed.floats(),
                                           g,
                                           rows,
                                           columns,
                                           normed ? nullptr : residual.data(),
                                           {}},
             outputs, what + ", backward");
    }
  }
}

}  // namespace reference
