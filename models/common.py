"""What the networks share: their description of data and feature maps, and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class DataConfig:
    """What a network expects of a photograph.

    The shorter side is resized to ``resize``, the centre ``resolution``² is cropped, values in
    [0, 1] become (x − mean) / std.
    """

    resolution: int
    resize: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bicubic"

    def at(self, resolution: int) -> DataConfig:
        """The same for images of another size; as many pixels are cropped."""
        margin = self.resize - self.resolution
        return replace(self, resolution=resolution, resize=resolution + margin)


class Feature(NamedTuple):
    """One map of a feature extractor."""

    stage: int  # EfficientNet: index into ``blocks``; ResNet: 0 is the stem, i is ``layer<i>``
    channels: int
    reduction: int  # input pixels per pixel, in each direction


def last_of_each_resolution(stages: list[Feature]) -> list[Feature]:
    """The stages whose maps a feature extractor returns."""
    following = [stage.reduction for stage in stages[1:]]
    return [
        stage
        for stage, reduction in zip(stages, [*following, 0], strict=True)
        if stage.reduction != reduction
    ]


def class_count(owner: str, value: Any) -> int:
    """``value`` if it can be a ``num_classes``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{owner}: num_classes is {value!r}, a non-negative integer is accepted")
    return value


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines of a table whose first ``left`` columns are aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, tuple("-" * width for width in widths), *rows):
        cells = [
            f"{text:<{width}}" if index < left else f"{text:>{width}}"
            for index, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return lines
