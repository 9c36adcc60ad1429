"""Dense convolution as an implicit matrix product.

    P[m, k] = Σ_(tap, c) input[pixel m at tap, c] · weight[k, tap, c]       m: output pixel
    output  = activation(scale[k] · P + bias[k] + residual[m, k])           depth: taps · C

Layout: input [N, H, W, C], weight [K, kh, kw, C], output and residual [N, H', W', K], all dense;
the stem's kernel also reads NCHW input and takes the weight as [C · kh · kw, K].
Moves: every tensor once through device memory; the input once a tap from the L2. On an H100
(3.0 TB/s, 800 TFLOP/s), bfloat16, batch 256: B0's stem (3 -> 32, 3x3, stride 2, 224²) moves 77 MB
in and 206 MB out, 94 µs, for 5.5 GFLOP, 7 µs; ResNet-50's 64 -> 64, 3x3, 56² moves 206 MB, 69 µs,
for 59 GFLOP, 74 µs.

The idea. A program owns 64 or 128 output pixels, of whatever images and rows, by up to 256 outputs.
What a step multiplies, 128 bytes of every pixel, comes one of two ways:

- a tap's channels, where the step divides C: tap and channel are scalars, a pixel's address costs
  one add and its border test two compares for 128 bytes;
- FLAT, for 24, 40, 48 channels: the depth (tap, c) is cut without regard to taps, so nothing is
  padded; each thread finds the tap of its own 16 bytes by two divisions a step, once for all of
  its pixels.

Either way 16-byte cp.async writes into a ring of stages, zeros outside the image. Programs go
through the outputs of one set of pixels before the next set: input tiles are read again while they
are in the L2, and the weights stay there throughout. Few tiles (batch 1): SPLIT cuts the depth into
equal parts; each writes its sums, in float32, which the epilogue's kernel adds in order.

The stem (C ≤ 4) has no 16 bytes of channels. There a thread takes one pixel and all 27 values under
its window: the loads of a warp are those of 32 neighbours, taps are constants of the code, and
no address but the pixel's is computed. Weights are laid depth first, for 16-byte loads.

Seen in the compiler's output (Triton 3.8, sm_90, bfloat16; no GPU has run this). A step of 128 x
128 x 64 is about 130 instructions a warp in SASS, 186 FLAT, for 512 clocks of the tensor cores:
with two warps a scheduler 260 and 372 of its 512 issue slots. 128 registers and 96 KB in three
stages: two blocks a processor. B0's stem: about 600 instructions of PTX for a warp's 32 pixels, by
reckoning 65 µs of issue beside 94 µs of memory traffic; ResNet's 7x7: 1,840, 200 µs beside 163 µs,
so it is bound by its gathers, the first thing to measure.
Tried and lost:
- the channel as a loop variable without ``multiple_of``: single-value loads through registers, 220
  of them, and one stage fewer;
- sums stored in one piece: with scale and residual 174 registers, one block a processor; 128 x 256
  spills. In halves 128 and 240;
- the stem with two threads a pixel: half the registers, as many instructions a warp, so twice as
  many a pixel. 64 deep steps: a third more instructions for zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .language import activate, dot, kernel, rounded, row_offsets

_OUTSIDE = tl.constexpr(-(2**30))  # a row or column that no tap brings back into the image


@triton.jit
def inside(position, size):
    """0 <= position < size, as one unsigned compare."""
    return position.to(tl.uint32, bitcast=True) < size


@triton.jit
def inside_image(h, w, height, width):
    """Both inside. (One compare at the end, because of two masks' conjunction LLVM makes vectors of
    bits now and then, for which it reserves local memory.)"""
    return inside(tl.where(inside(h, height), w, _OUTSIDE), width)


@triton.jit
def store(
    output_ptr,
    x,
    m,
    n,
    rows,
    outputs,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """activation(scale · x + bias + residual) of a tile of pixels ``m`` by outputs ``n``."""
    offsets = row_offsets(m, outputs, WIDE)[:, None] + n[None, :]
    mask = (m < rows)[:, None] & (n < outputs)[None, :]
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
        x = x * scale[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < outputs, other=0.0).to(tl.float32)
        x = x + bias[None, :]
    if residual_ptr is not None:
        x = x + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = rounded(activate(x, ACTIVATION), output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, value, mask=mask)


@kernel
def _conv_kernel(
    output_ptr,
    input_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows,
    height,
    width,
    out_height,
    out_width,
    channel_vectors,
    output_vectors,
    kernel_height,
    kernel_width,
    stride_height,
    stride_width,
    top,
    left,
    dilation_height,
    dilation_width,
    split_steps,
    VECTOR: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    outputs = output_vectors * OUTPUT_VECTOR
    depth = kernel_height * kernel_width * channels
    steps = tl.cdiv(depth, BLOCK_K)
    columns = tl.cdiv(outputs, BLOCK_N)
    tile = tl.program_id(0)
    first = 0
    if SPLIT:
        tiles = tl.cdiv(rows, BLOCK_M) * columns
        split = tile // tiles
        tile = tile % tiles
        first = split * split_steps
        steps = tl.minimum(first + split_steps, steps)
    block = tile // columns
    if WIDE:
        block = block.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)

    image = m // (out_height * out_width)
    pixel = (m % (out_height * out_width)).to(tl.int32)
    h0 = pixel // out_width * stride_height - top
    h0 = tl.where(m < rows, h0, _OUTSIDE)
    w0 = pixel % out_width * stride_width - left
    base = ((image * height + h0) * width + w0) * channels
    # Columns past the last take the first ones' weights, and are not stored.
    weights = weight_ptr + (row_offsets(n % outputs, depth, WIDE)[None, :] + k[:, None])

    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if FLAT:
        for step in range(first, steps):
            d = step * BLOCK_K + k
            tap, c = d // channels, d % channels
            h = tap // kernel_width * dilation_height
            w = tap % kernel_width * dilation_width
            seen = inside_image(h0[:, None] + h[None, :], w0[:, None] + w[None, :], height, width)
            offsets = base[:, None] + ((h * width + w) * channels + c)[None, :]
            a = tl.load(input_ptr + offsets, mask=seen & (d < depth)[None, :], other=0.0)
            b = tl.load(weights + step * BLOCK_K, mask=(d < depth)[:, None], other=0.0)
            accumulator = dot(a, b, accumulator, PRECISION)
    else:
        # The step divides the channels; c, tap_column and tap_row count like an odometer.
        start = first * BLOCK_K
        c = start % channels
        tap_column = start // channels % kernel_width
        tap_row = start // channels // kernel_width
        for step in range(first, steps):
            c = tl.multiple_of(c, BLOCK_K)
            h, w = tap_row * dilation_height, tap_column * dilation_width
            seen = inside_image(h0 + h, w0 + w, height, width)
            offsets = base[:, None] + ((h * width + w) * channels + c + k)[None, :]
            a = tl.load(input_ptr + offsets, mask=seen[:, None], other=0.0)
            b = tl.load(weights + step * BLOCK_K)
            accumulator = dot(a, b, accumulator, PRECISION)
            c += BLOCK_K
            tap_column = tl.where(c == channels, tap_column + 1, tap_column)
            c = tl.where(c == channels, 0, c)
            tap_row = tl.where(tap_column == kernel_width, tap_row + 1, tap_row)
            tap_column = tl.where(tap_column == kernel_width, 0, tap_column)

    target = output_ptr
    if SPLIT:
        target += split.to(tl.int64) * rows * outputs
    if BLOCK_N >= 64:
        # Halves: a residual's tile beside all of the sums would take more registers than there are.
        half: tl.constexpr = BLOCK_N // 2
        halves = tl.permute(tl.reshape(accumulator, [BLOCK_M, 2, half]), [0, 2, 1])
        left_half, right_half = tl.split(halves)
        n = tile % columns * BLOCK_N + tl.arange(0, half)
        store(
            target,
            left_half,
            m,
            n,
            rows,
            outputs,
            scale_ptr,
            bias_ptr,
            residual_ptr,
            ACTIVATION,
            WIDE,
        )
        store(
            target,
            right_half,
            m,
            n + half,
            rows,
            outputs,
            scale_ptr,
            bias_ptr,
            residual_ptr,
            ACTIVATION,
            WIDE,
        )
    else:
        store(
            target,
            accumulator,
            m,
            n,
            rows,
            outputs,
            scale_ptr,
            bias_ptr,
            residual_ptr,
            ACTIVATION,
            WIDE,
        )


@kernel
def _stem_kernel(
    output_ptr,
    input_ptr,
    weight_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows,
    height,
    width,
    out_height,
    out_width,
    output_vectors,
    image_stride,
    channel_stride,
    row_stride,
    column_stride,
    stride_height,
    stride_width,
    top,
    left,
    dilation_height,
    dilation_width,
    CHANNELS: tl.constexpr,
    KERNEL_HEIGHT: tl.constexpr,
    KERNEL_WIDTH: tl.constexpr,
    OUTPUT_VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    DEPTH: tl.constexpr = CHANNELS * KERNEL_HEIGHT * KERNEL_WIDTH
    outputs = output_vectors * OUTPUT_VECTOR
    columns = tl.cdiv(outputs, BLOCK_N)
    block = tl.program_id(0) // columns
    if WIDE:
        block = block.to(tl.int64)
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)

    image = m // (out_height * out_width)
    pixel = (m % (out_height * out_width)).to(tl.int32)
    h0 = pixel // out_width * stride_height - top
    h0 = tl.where(m < rows, h0, _OUTSIDE)
    w0 = pixel % out_width * stride_width - left
    base = image * image_stride + h0 * row_stride + w0 * column_stride

    accumulator = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in tl.static_range(0, DEPTH, BLOCK_K):
        d = first + tl.arange(0, BLOCK_K)
        c = d // (KERNEL_HEIGHT * KERNEL_WIDTH)
        h = d // KERNEL_WIDTH % KERNEL_HEIGHT * dilation_height
        w = d % KERNEL_WIDTH * dilation_width
        seen = inside_image(h0[None, :] + h[:, None], w0[None, :] + w[:, None], height, width)
        taps = c * channel_stride + h * row_stride + w * column_stride
        a = tl.load(  # [depth, pixels]: neighbours in a warp are neighbours in a row
            input_ptr + (base[None, :] + taps[:, None]),
            mask=seen & (d < DEPTH)[:, None],
            other=0.0,
        )
        b = tl.load(
            weight_ptr + (d[:, None] * outputs + n[None, :]),
            mask=(d < DEPTH)[:, None] & (n < outputs)[None, :],
            other=0.0,
        )
        accumulator = dot(tl.trans(a), b, accumulator, PRECISION)

    store(
        output_ptr,
        accumulator,
        m,
        n,
        rows,
        outputs,
        scale_ptr,
        bias_ptr,
        residual_ptr,
        ACTIVATION,
        WIDE,
    )
