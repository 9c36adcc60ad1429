"""What follows a convolution as a pass of its own, and its gradient.

    output = activation(scale[k] · P + bias[k] + residual)        P: cuDNN's output, or the sum of
                                                                  split-K's parts
    t      = gradient · activation'(scale[k] · P + bias[k] + residual)
    scaled = scale[k] · t,   Σ t,   Σ t · P                       sums over pixels, for each k

Layout: [pixels, K] dense (NHWC), vectors [K], parts [splits, pixels, K] float32.
Moves: P and the residual in, the output out, in place where P is cuDNN's; backward: gradient, P and
the residual in; t and scaled out, those that anybody needs. ResNet-50's 256 channels of 14² at
batch 256, bfloat16: 26 MB a tensor, so 17 µs forward on an H100 at 3.0 TB/s, 26 µs backward.
The idea: forward the elements are taken in memory's order, 16 bytes a thread and access, whatever
K is: a thread's channel is one remainder an access. Backward a program keeps tiles of pixels by
channels and adds them up in registers; one row of partial sums a program, added in a fixed order by
``reduce.totals``.
Tried: nothing yet, no GPU has run this.
"""

from __future__ import annotations

import triton.language as tl

from .language import activate, kernel, rounded, row_offsets, slope


@kernel
def _epilogue_kernel(
    output_ptr,
    source_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows,
    channel_vectors,
    splits,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, channels = tl.program_id(0), channel_vectors * VECTOR
    if WIDE:
        program = program.to(tl.int64)
    elements = row_offsets(channels, rows, WIDE)
    offsets = program * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < elements
    channel = offsets % channels
    x = tl.load(source_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if SPLIT:
        for _ in range(1, splits):
            source_ptr += elements
            x += tl.load(source_ptr + offsets, mask=mask, other=0.0)
    if scale_ptr is not None:
        x = x * tl.load(scale_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x = x + tl.load(bias_ptr + channel, mask=mask, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        x = x + tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    value = rounded(activate(x, ACTIVATION), output_ptr.dtype.element_ty)
    tl.store(output_ptr + offsets, value, mask=mask)


@kernel
def _gradient_kernel(
    t_ptr,
    scaled_ptr,
    bias_sums_ptr,
    scale_sums_ptr,
    gradient_ptr,
    raw_ptr,
    scale_ptr,
    bias_ptr,
    residual_ptr,
    rows,
    channel_vectors,
    steps,
    VECTOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    channels = channel_vectors * VECTOR
    columns = tl.cdiv(channels, BLOCK_CHANNELS)
    part = tl.program_id(0) // columns
    n = tl.program_id(0) % columns * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    r = tl.arange(0, BLOCK_ROWS)
    scale, bias = 1.0, 0.0
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < channels, other=0.0).to(tl.float32)[None, :]
    bias_sums = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    scale_sums = tl.zeros([BLOCK_ROWS, BLOCK_CHANNELS], tl.float32)
    for step in range(steps):
        block = part * steps + step
        if WIDE:
            block = block.to(tl.int64)
        m = block * BLOCK_ROWS + r
        offsets = row_offsets(m, channels, WIDE)[:, None] + n[None, :]
        mask = (m < rows)[:, None] & (n < channels)[None, :]
        t = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        if raw_ptr is not None:
            raw = tl.load(raw_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
            if ACTIVATION != "none":
                before = raw * scale + bias
                if residual_ptr is not None:
                    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
                    before += residual.to(tl.float32)
                t *= slope(before, ACTIVATION)
            if scale_sums_ptr is not None:
                scale_sums += t * raw
        if bias_sums_ptr is not None:
            bias_sums += t
        if t_ptr is not None:
            tl.store(t_ptr + offsets, rounded(t, t_ptr.dtype.element_ty), mask=mask)
        if scaled_ptr is not None:
            scaled = rounded(t * scale, scaled_ptr.dtype.element_ty)
            tl.store(scaled_ptr + offsets, scaled, mask=mask)
    sums = part.to(tl.int64) * channels + n
    if bias_sums_ptr is not None:
        tl.store(bias_sums_ptr + sums, tl.sum(bias_sums, 0), mask=n < channels)
    if scale_sums_ptr is not None:
        tl.store(scale_sums_ptr + sums, tl.sum(scale_sums, 0), mask=n < channels)
