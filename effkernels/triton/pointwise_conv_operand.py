"""Loading one side of a product, with its prologue: shared by the kernels of `pointwise_conv`.

An operand is a tile of rows (pixels) × channels of an NHWC tensor. What varies by image (a gate, an
offset) is read as vectors, one for each image that the tile touches, and chosen by row: a tile of
128 rows crosses into a second image at most once where images have 127 pixels or more, and has rows
of four 7 × 7 images. Reading it as a tile instead would double what comes from the L2 cache.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..operands import Forward, Gradient
from .language import forward_operand, gradient_operand

_MOST_IMAGES = 4  # of a tile; beyond that vectors cost more than a gather


@triton.jit
def per_image(vectors_ptr, image, first_image, images, c, inside_c, channels, IMAGES: tl.constexpr):
    """[rows, c] float32: vectors[image of the row, c], of [N, channels].

    Args:
        image: of each row.
        first_image: of the first row.
        IMAGES: how many consecutive images the rows can be of; 0: any number.
    """
    if IMAGES == 0:
        last = tl.minimum(image, images - 1)
        offsets = (last * channels)[:, None] + c[None, :]
        value = tl.load(vectors_ptr + offsets, mask=inside_c[None, :], other=0.0).to(tl.float32)
    else:
        first = tl.load(vectors_ptr + first_image * channels + c, mask=inside_c, other=0.0)
        value = first.to(tl.float32)[None, :]
        for i in tl.static_range(1, IMAGES):
            n = tl.minimum(first_image + i, images - 1)
            vector = tl.load(vectors_ptr + n * channels + c, mask=inside_c, other=0.0)
            value = tl.where(
                (image == first_image + i)[:, None], vector.to(tl.float32)[None, :], value
            )
    return value


@triton.jit
def load_operand(
    input_ptr,
    z_ptr,
    scale_ptr,
    shift_ptr,
    gate_ptr,
    offset_ptr,
    factor_ptr,
    slope_ptr,
    constant_ptr,
    row_offset,
    inside_rows,
    image,
    first_image,
    images,
    c,
    channels,
    PROLOGUE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    IMAGES: tl.constexpr,
):
    """[rows, c]: an `operands.Forward` or `operands.Gradient`.

    The tensor's own type where PROLOGUE is "plain", else float32. What is outside is zero only
    where it is plain.

    Args:
        row_offset: where each row begins.
        PROLOGUE: "plain", "forward" or "gradient".
    """
    inside_c = c < channels
    inside = inside_rows[:, None] & inside_c[None, :]
    offsets = row_offset[:, None] + c[None, :]
    if PROLOGUE == "plain":
        value = tl.load(input_ptr + offsets, mask=inside, other=0.0)
    else:
        scale, shift, gate, offset = 1.0, 0.0, 1.0, 0.0
        factor, gradient_slope, constant, z = 1.0, 0.0, 0.0, 0.0
        if input_ptr is not None:
            x = tl.load(input_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        if input_ptr is None:
            x = tl.zeros_like(z)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
            shift = tl.load(shift_ptr + c, mask=inside_c, other=0.0).to(tl.float32)[None, :]
        if gate_ptr is not None:
            gate = per_image(gate_ptr, image, first_image, images, c, inside_c, channels, IMAGES)
        if offset_ptr is not None:
            offset = per_image(
                offset_ptr, image, first_image, images, c, inside_c, channels, IMAGES
            )
        if factor_ptr is not None:
            factor = tl.load(factor_ptr + c, mask=inside_c, other=0.0)[None, :]
        if slope_ptr is not None:
            gradient_slope = tl.load(slope_ptr + c, mask=inside_c, other=0.0)[None, :]
            constant = tl.load(constant_ptr + c, mask=inside_c, other=0.0)[None, :]
        if PROLOGUE == "forward":
            value = forward_operand(
                x,
                scale,
                shift,
                gate,
                AFFINE=scale_ptr is not None,
                ACTIVATION=ACTIVATION,
                GATED=gate_ptr is not None,
            )
        else:
            value = gradient_operand(
                x,
                z,
                scale,
                shift,
                gate,
                offset,
                factor,
                gradient_slope,
                constant,
                AFFINE=scale_ptr is not None,
                ACTIVATION=ACTIVATION,
                GATED=gate_ptr is not None,
                OFFSET=offset_ptr is not None,
                NORMALIZED=slope_ptr is not None,
            )
            if factor_ptr is not None and slope_ptr is None:
                value = value * factor
    return value


class Operand(NamedTuple):
    """What a kernel is given of an operand: pointers in `load_operand`'s order, and constants."""

    pointers: tuple[Tensor | None, ...]  # the tensor, z and seven vectors
    prologue: str
    activation: str
    varies: bool  # by image

    @property
    def key(self) -> str:
        """What the autotuner tells prologues apart by."""
        given = "".join("01"[pointer is not None] for pointer in self.pointers[1:])
        return self.prologue if self.prologue == "plain" else f"{self.prologue}-{given}"


def operand_of(tensor: Tensor | None, operand: Forward | Gradient) -> Operand:
    """``operand`` of ``tensor``; a gradient's may be None (zeros) where it has an offset and z."""
    if isinstance(operand, Gradient) and operand.activation == "none":
        # The slope of nothing asks for no z.
        operand = operand._replace(scale=None, shift=None)
        if operand.slope is None and tensor is not None:
            operand = operand._replace(z=None)
    vectors: tuple[Any, ...]
    if isinstance(operand, Gradient):
        z = operand.z
        vectors = operand[1:3] + operand[4:]
        plain = operand == Gradient()
        prologue = "gradient"
    else:
        z = None
        vectors = (*operand[:2], operand.gate, None, None, None, None)
        plain = operand.is_plain()
        prologue = "forward"
    vectors = tuple(None if vector is None else vector.contiguous() for vector in vectors)
    varies = vectors[2] is not None or vectors[3] is not None
    return Operand(
        (tensor, z, *vectors), "plain" if plain else prologue, operand.activation, varies
    )


NO_OPERAND = Operand((None,) * 9, "plain", "none", False)


def images_of_a_tile(block_rows: int, pixels: int, images: int) -> int:
    """IMAGES of `per_image`: 1, 2, 4, or 0 for more."""
    most = 1 if pixels % block_rows == 0 else (block_rows - 2) // pixels + 2
    most = max(1, min(most, images))
    return 0 if most > _MOST_IMAGES else triton.next_power_of_2(most)
