"""An inverted residual's expansion and depthwise convolution in one kernel.

    expanded = activation(expand_scale · (W · input) + expand_bias)           never in DRAM
    hidden   = activation(scale · (taps ∗ expanded) + bias), and its sums over pixels

Layout: NHWC; input [N, H, W, C], W [E, C], taps [kh·kw, E], hidden [N, H', W', E].

A program takes a band of output rows of one image and a block of expanded channels. It expands the
rows that the band's windows see, zeros around the image included, into a piece of scratch memory of
its own, and convolves from there. Programs are persistent (as many as the device holds at a time)
and use their piece again for every band, so it stays in the L2: B0's second block (112x112, 16 ->
96 channels, stride 2) at batch 256 reads 103 MB and writes 154 MB, 86 µs at 3.0 TB/s, where the
two kernels on their own move 103 + 617 · 2 + 154 MB, 497 µs.

Through the L2 go the scratch's writes and the reads that miss the L1; the expansion of the rows
that two bands share is done twice: (band + k − stride) / band of the products.

The windows read the scratch without masks: k² vectors of 16 bytes for each vector of outputs, from
the L1 mostly, and as many of taps, which all pixels share.

Tried, by the compiler's output for sm_80, sm_90 and sm_100 (no GPU has run this): rows of taps
unrolled like columns take all 255 registers and spill at 5x5, for every load moves to the front, so
the loop over rows has a length that the compiler does not know (118-128 registers). Two stages of
the expansion's pipeline spill, one does not; its products are one to four steps deep. Four vectors
of outputs a thread spill, two do at 5x5 on sm_80, one never does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import empty_nhwc, output_size
from .language import activate, dot, kernel, rounded
from .launch import device_of, launch, vector_width
from .mbconv_config import FusedConfig


@kernel
def _expand_depthwise_kernel(
    output_ptr,
    partials_ptr,
    scratch_ptr,
    input_ptr,
    expand_weight_ptr,
    expand_scale_ptr,
    expand_bias_ptr,
    taps_ptr,
    scale_ptr,
    bias_ptr,
    height,
    width,
    input_vectors,
    output_height,
    output_width,
    expanded_vectors,
    top,
    left,
    items,
    band_rows,
    kernel_rows,  # KERNEL_HEIGHT, in a form that keeps the compiler from unrolling rows
    VECTOR: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    STRIDE_HEIGHT: tl.constexpr,
    STRIDE_WIDTH: tl.constexpr,
    DILATION_HEIGHT: tl.constexpr,
    DILATION_WIDTH: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
):
    inputs = input_vectors * VECTOR
    expanded = expanded_vectors * VECTOR
    # What the windows of a band see: rows and columns, those outside the image included.
    seen_rows = (band_rows - 1) * STRIDE_HEIGHT + (KERNEL_HEIGHT - 1) * DILATION_HEIGHT + 1
    seen_columns = (output_width - 1) * STRIDE_WIDTH + (KERNEL_WIDTH - 1) * DILATION_WIDTH + 1
    seen = seen_rows * seen_columns
    bands = tl.cdiv(output_height, band_rows)
    blocks = tl.cdiv(expanded, BLOCK_CHANNELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    scratch_ptr += tl.program_id(0).to(tl.int64) * seen * BLOCK_CHANNELS

    for item in range(tl.program_id(0), items, tl.num_programs(0)):
        # Programs that run at the same time share a band's input.
        e = item % blocks * BLOCK_CHANNELS + channel
        band = item // blocks % bands
        image = item // blocks // bands
        here = e < expanded
        first_row = band * band_rows

        # The expansion, into the scratch.
        image_ptr = input_ptr + image.to(tl.int64) * height * width * inputs
        if expand_scale_ptr is not None:
            expand_scale = tl.load(expand_scale_ptr + e, mask=here, other=0.0).to(tl.float32)
        if expand_bias_ptr is not None:
            expand_bias = tl.load(expand_bias_ptr + e, mask=here, other=0.0).to(tl.float32)
        for begin in range(0, seen, BLOCK_PIXELS):
            pixel = begin + tl.arange(0, BLOCK_PIXELS)
            y = first_row * STRIDE_HEIGHT - top + pixel // seen_columns
            x = pixel % seen_columns - left
            inside = (y >= 0) & (y < height) & (x >= 0) & (x < width) & (pixel < seen)
            accumulator = tl.zeros([BLOCK_PIXELS, BLOCK_CHANNELS], tl.float32)
            for depth in range(0, inputs, BLOCK_DEPTH):
                c = depth + tl.arange(0, BLOCK_DEPTH)
                pixels = tl.load(
                    image_ptr + (y * width + x)[:, None] * inputs + c[None, :],
                    mask=inside[:, None] & (c < inputs)[None, :],
                    other=0.0,
                )
                weights = tl.load(
                    expand_weight_ptr + e[None, :] * inputs + c[:, None],
                    mask=here[None, :] & (c < inputs)[:, None],
                    other=0.0,
                )
                accumulator = dot(pixels, weights, accumulator, PRECISION)
            if expand_scale_ptr is not None:
                accumulator *= expand_scale[None, :]
            if expand_bias_ptr is not None:
                accumulator += expand_bias[None, :]
            values = tl.where(inside[:, None], activate(accumulator, ACTIVATION), 0.0)
            tl.store(
                scratch_ptr + pixel[:, None] * BLOCK_CHANNELS + channel[None, :],
                rounded(values, scratch_ptr.dtype.element_ty),
                mask=(pixel < seen)[:, None],
            )
        tl.debug_barrier()

        # The convolution, out of it.
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + e, mask=here, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            bias = tl.load(bias_ptr + e, mask=here, other=0.0).to(tl.float32)
        total = tl.zeros([BLOCK_CHANNELS], tl.float32)
        image_out_ptr = output_ptr + image.to(tl.int64) * output_height * output_width * expanded
        for begin in range(0, band_rows * output_width, BLOCK_OUTPUTS):
            place = begin + tl.arange(0, BLOCK_OUTPUTS)
            row, column = place // output_width, place % output_width
            wanted = (row < band_rows) & (first_row + row < output_height)
            row = tl.minimum(row, band_rows - 1)
            window = row * STRIDE_HEIGHT * seen_columns + column * STRIDE_WIDTH
            corner_ptr = scratch_ptr + window[:, None] * BLOCK_CHANNELS + channel[None, :]
            result = tl.zeros([BLOCK_OUTPUTS, BLOCK_CHANNELS], tl.float32)
            for i in range(kernel_rows):
                for j in tl.static_range(KERNEL_WIDTH):
                    step = i * DILATION_HEIGHT * seen_columns + j * DILATION_WIDTH
                    tap = tl.load(
                        taps_ptr + (i * KERNEL_WIDTH + j) * expanded + e, mask=here, other=0.0
                    )
                    seen_values = tl.load(corner_ptr + step * BLOCK_CHANNELS)
                    result += seen_values.to(tl.float32) * tap.to(tl.float32)[None, :]
            if scale_ptr is not None:
                result *= scale[None, :]
            if bias_ptr is not None:
                result += bias[None, :]
            result = activate(result, ACTIVATION)
            offsets = ((first_row + row) * output_width + column)[:, None] * expanded + e[None, :]
            tl.store(
                image_out_ptr + offsets,
                rounded(result, output_ptr.dtype.element_ty),
                mask=wanted[:, None] & here[None, :],
            )
            if partials_ptr is not None:
                total += tl.sum(tl.where(wanted[:, None], result, 0.0), 0)
        if partials_ptr is not None:
            place = (image.to(tl.int64) * bands + band) * expanded
            tl.store(partials_ptr + place + e, total, mask=here)
        tl.debug_barrier()


class ExpandedDepthwise(NamedTuple):
    """What :func:`expand_depthwise` gives."""

    output: Tensor  # [N, E, H', W'] channels_last
    partial_means: Tensor | None  # [N, bands, E] float32, whose sum over bands is that over pixels


def expand_depthwise(
    input: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor | None,
    expand_bias: Tensor | None,
    taps: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    activation: str,
    mean: bool,
    config: FusedConfig,
    precision: str,
) -> ExpandedDepthwise:
    """activation(depthwise(activation(expansion))) without the expanded tensor.

    Args:
        input: [N, C, H, W] channels_last.
        expand_weight: [E, C], dense.
        taps: [kh·kw, E], dense.
        expand_scale, expand_bias, scale, bias: [E] or None.
        kernel, stride, dilation: height, width.
        padding: left, right, top, bottom.
        mean: also give the sums over pixels.
        precision: what float32 operands are multiplied in.
    """
    images, inputs, height, width = input.shape
    expanded = expand_weight.shape[0]
    size = output_size((height, width), kernel, stride, padding, dilation)
    output = empty_nhwc(input, expanded, *size)
    bands = triton.cdiv(size[0], config.band)
    blocks = triton.cdiv(expanded, config.block_channels)
    items = images * bands * blocks
    programs = min(items, device_of(input).processors * config.programs)
    partials = None
    if mean:
        shape = (images, bands, expanded)
        partials = torch.empty(shape, dtype=torch.float32, device=input.device)
    seen = scratch_values(kernel, stride, dilation, size[1], config)
    scratch = torch.empty(programs * seen, dtype=input.dtype, device=input.device)
    vector = vector_width(input.dtype, inputs, expanded)
    launch(
        _expand_depthwise_kernel,
        (programs,),
        output,
        partials,
        scratch,
        input,
        expand_weight,
        expand_scale,
        expand_bias,
        taps,
        scale,
        bias,
        height,
        width,
        inputs // vector,
        *size,
        expanded // vector,
        padding[2],
        padding[0],
        items,
        config.band,
        kernel[0],
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        # Three products in place of one, on operands split in registers, leave no room for another.
        max_registers=255
        if precision == "tf32x3"
        else 65536 // (32 * config.num_warps * config.programs),
        VECTOR=vector,
        KERNEL_HEIGHT=kernel[0],
        KERNEL_WIDTH=kernel[1],
        STRIDE_HEIGHT=stride[0],
        STRIDE_WIDTH=stride[1],
        DILATION_HEIGHT=dilation[0],
        DILATION_WIDTH=dilation[1],
        ACTIVATION=activation,
        PRECISION=precision,
        BLOCK_PIXELS=config.block_pixels,
        BLOCK_OUTPUTS=config.block_outputs,
        BLOCK_CHANNELS=config.block_channels,
        BLOCK_DEPTH=config.block_depth,
    )
    return ExpandedDepthwise(output, partials)


def scratch_values(
    kernel: Sequence[int],
    stride: Sequence[int],
    dilation: Sequence[int],
    output_width: int,
    config: FusedConfig,
) -> int:
    """Values of scratch memory that one program uses."""
    rows = (config.band - 1) * stride[0] + (kernel[0] - 1) * dilation[0] + 1
    columns = (output_width - 1) * stride[1] + (kernel[1] - 1) * dilation[1] + 1
    return rows * columns * config.block_channels
