"""Cases and tensors for the ops' tests: every pair of options, realistic statistics, guards."""

from __future__ import annotations

import itertools
import random
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from effkernels.dispatch import use_backend
from effkernels.layout import output_size
from effkernels.ops._common import resolve_padding
from effkernels.testing import assert_matches

LAYOUTS = ("channels_last", "nchw", "sliced", "transposed", "expanded")
# None, or which of scale and bias are given; "32": in float32 whatever the input's dtype.
AFFINES = ("none", "bias", "scale+bias", "bias32", "scale32+bias32", "scale")
PADDINGS = ("symmetric", "same", 0, 1, 4, (2, 1), (0, 1, 2, 0), (3, 0, 0, 5), (9, 10, 11, 9))
# Output channels and pixels around the edges of register tiles, vectors and packed panels.
CHANNELS = (1, 3, 5, 8, 15, 16, 17, 31, 32, 33, 48, 49, 65)

# The fixture `kernels` only sets the instruction set, which is the same for every example.
random_cases = settings(
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


class Case(SimpleNamespace):
    """One combination of options, which its string names."""

    def __str__(self) -> str:
        return "-".join(f"{name}={_spelled(value)}" for name, value in vars(self).items())

    def draw(self, repetition: int, dtype: torch.dtype) -> Draw:
        """The source of this case's tensors, another for each repetition."""
        return Draw(zlib.crc32(str(self).encode()) + repetition, dtype)


def _spelled(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "x".join(_spelled(item) for item in value)
    return str(value)


def pairwise(
    axes: Mapping[str, Sequence[Any]], valid: Callable[[Case], bool] = lambda case: True
) -> list[Case]:
    """Few cases that contain every valid pair of values of two different axes (greedy)."""
    names = list(axes)
    chooser = random.Random(0)
    wanted = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }

    def pairs(choice: Sequence[int]) -> set[Any]:
        return set(itertools.combinations(enumerate(choice), 2))

    def case(choice: Sequence[int]) -> Case:
        return Case(**{n: axes[n][i] for n, i in zip(names, choice, strict=True)})

    cases = []
    for seed in sorted(wanted):  # each case starts from a pair that no case holds yet
        if seed not in wanted:
            continue
        best: tuple[int, list[int]] | None = None
        for _ in range(24):
            choice = [chooser.randrange(len(axes[name])) for name in names]
            for axis, index in seed:
                choice[axis] = index
            if valid(case(choice)):
                gain = len(pairs(choice) & wanted)
                if best is None or gain > best[0]:
                    best = gain, choice
        if best is not None:
            wanted -= pairs(best[1])
            cases.append(case(best[1]))
    chooser.shuffle(cases)
    return cases


def cases_of(axes: Mapping[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[Case]:
    """Random cases, one strategy per axis."""
    return st.fixed_dictionaries(dict(axes)).map(lambda values: Case(**values))


def geometry_size(case: Case, kernel: Sequence[int] | None = None) -> tuple[int, int]:
    """Height and width of the output of a convolution ``case``; below 1: there is none."""
    kernel = kernel or both(case.kernel)
    stride, dilation = both(case.stride), both(case.dilation)
    sides = resolve_padding("test", case.padding, case.size, kernel, stride, dilation)
    return output_size(case.size, kernel, stride, sides, dilation)


def both(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def has_output(case: Case) -> bool:
    return min(geometry_size(case)) >= 1


class Draw:
    """Fresh tensors with the statistics of a trained network, all from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def normal(self, *shape: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return (values * std + mean).to(self.dtype)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        values = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * values).to(self.dtype)

    def activations(
        self, batch: int, channels: int, size: Sequence[int], layout: str = "channels_last"
    ) -> Tensor:
        """[N, C, H, W]: every channel has its own mean and deviation."""
        height, width = size
        if layout == "expanded":  # one image for the whole batch, one row for all of them
            row = self.activations(1, channels, (1, width), "nchw")
            return row.expand(batch, channels, height, width)
        if layout == "sliced":  # every second row of something bigger
            whole = self.activations(batch + 1, channels + 2, (2 * height + 1, width + 3), "nchw")
            return whole[1:, 1 : channels + 1, 1 : 2 * height : 2, 2 : width + 2]
        shift = self.normal(1, channels, 1, 1, std=0.5, mean=0.2)
        spread = self.uniform(1, channels, 1, 1, low=0.5, high=1.5)
        values = self.normal(batch, channels, height, width) * spread + shift
        if layout == "transposed":  # width before height in memory
            return values.transpose(2, 3).contiguous().transpose(2, 3)
        if layout == "nchw":
            return values
        assert layout == "channels_last"
        return values.contiguous(memory_format=torch.channels_last)

    def weight(self, *shape: int) -> Tensor:
        """He initialisation: variance 2 / fan-in."""
        fan_in = max(1, int(torch.Size(shape[1:]).numel()))
        return self.normal(*shape, std=(2.0 / fan_in) ** 0.5)

    def affine(self, channels: int, kind: str) -> dict[str, Tensor]:
        """What ``kind`` (one of AFFINES) names, as a folded BatchNorm has it."""
        vectors: dict[str, Tensor] = {}
        if "scale" in kind:
            vectors["scale"] = self.normal(channels, std=0.3, mean=1.0)
        if "bias" in kind:
            vectors["bias"] = self.normal(channels, std=0.3)
        return {name: v.float() if "32" in kind else v for name, v in vectors.items()}

    def gate(self, batch: int, channels: int) -> Tensor:
        return self.uniform(batch, channels, low=0.05, high=0.95)


Arguments = tuple[tuple[Any, ...], dict[str, Any]]

# A few numbers, or the errors of one gate or one mean that all others share, say little about how
# large an error is: what is small is drawn several times, and the draws are judged together. Most
# results are well inside what is allowed, and a few draws show it. Where they do not, more decide:
# PyTorch may have been exact by luck, or an error be large by a rare chance. An error that no
# rounding explains stays what it is.
FEW_DRAWS, MORE_DRAWS, MANY_DRAWS = 3, 16, 128
PLENTY = 2**16  # numbers of one draw that say enough


def assert_parity(
    backend: str,
    op: Callable[..., Any],
    arguments: Callable[[int], Arguments],
    *,
    channels_last: bool = True,
) -> None:
    """``op`` on ``backend`` is as accurate as the reference.

    Args:
        backend: "native", or "reference" where nothing was compiled.
        op: the op under test.
        arguments: repetition -> (positional, keyword) arguments.
        channels_last: every image that comes out must be dense in that order.
    """

    def run(draws: list[Arguments]) -> tuple[Tensor, ...]:
        results = [outputs_of(op(*args, **options)) for args, options in draws]
        for outputs in results:
            for output in outputs:
                if channels_last and output.dim() == 4:
                    assert is_nhwc(output), f"strides {output.stride()}"
        return tuple(torch.cat([r.flatten() for r in same]) for same in zip(*results, strict=True))

    draws = [arguments(0)]
    with use_backend("reference"):
        count = max(output.numel() for output in run(draws))
    one = backend == "triton" or not 0 < count < PLENTY  # interpreted kernels are slow
    for wanted in (1 if one else FEW_DRAWS, MORE_DRAWS, MANY_DRAWS):
        draws += [arguments(repetition) for repetition in range(len(draws), wanted)]
        try:
            assert_matches(run, draws, backend=backend)
            return
        except AssertionError as error:
            measure = re.search("(norm|largest element) of the error", str(error))
            # Among 16 draws a norm is certain; a largest element may still be a rare one.
            if measure is None or wanted == (MORE_DRAWS if measure[1] == "norm" else MANY_DRAWS):
                raise


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def is_nhwc(tensor: Tensor) -> bool:
    return tensor.is_contiguous(memory_format=torch.channels_last)


def same_bits(left: Any, right: Any) -> bool:
    """Every output of two calls agrees to the bit, NaN included."""
    pairs = zip(outputs_of(left), outputs_of(right), strict=True)
    return all(a.shape == b.shape and torch.equal(bits(a), bits(b)) for a, b in pairs)


def bits(tensor: Tensor) -> Tensor:
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_threads_agree(op: Callable[..., Any], arguments: Arguments) -> None:
    """One, two and three threads, and a repeated call, give the same bits."""
    args, options = arguments
    with use_backend("native"):
        with threads(1):
            once = op(*args, **options)
            assert same_bits(once, op(*args, **options)), "a repeated call differs"
        for count in (2, 3):
            with threads(count):
                for _ in range(2):
                    assert same_bits(once, op(*args, **options)), f"{count} threads differ"


MARGIN = 67  # elements on each side: odd, so that a guarded tensor is not aligned to a vector


def guarded(tensor: Tensor) -> Tensor:
    """The same values with NaN in memory before and after them: reading those spreads NaN."""
    memory = torch.full((tensor.numel() + 2 * MARGIN,), torch.nan, dtype=tensor.dtype)
    return memory.as_strided(tensor.shape, tensor.stride(), MARGIN).copy_(tensor)


class GuardedMemory:
    """Stands in for ``torch.empty`` and ``torch.empty_like``: NaN inside, guards around."""

    def __init__(self) -> None:
        self._buffers: list[Tensor] = []
        self._empty = torch.empty

    def empty(self, *size: Any, memory_format: Any = torch.contiguous_format, **kw: Any) -> Tensor:
        plain = self._empty(*size, memory_format=memory_format, **kw)
        return self._replacement(plain)

    def empty_like(self, like: Tensor, **options: Any) -> Tensor:
        return self._replacement(_empty_like(like, **options))

    def _replacement(self, plain: Tensor) -> Tensor:
        if not plain.is_floating_point():
            return plain
        memory = self._empty(plain.numel() + 2 * MARGIN, dtype=plain.dtype).fill_(torch.nan)
        self._buffers.append(memory)
        return memory.as_strided(plain.shape, plain.stride(), MARGIN)

    def check(self) -> int:
        """Assert that every guard is as it was; how many tensors were made."""
        for memory in self._buffers:
            margins = torch.cat([memory[:MARGIN], memory[-MARGIN:]])
            assert torch.equal(bits(margins), bits(torch.full_like(margins, torch.nan))), (
                "written outside the output"
            )
        return len(self._buffers)


_empty_like = torch.empty_like


def assert_memory_kept(monkeypatch: Any, op: Callable[..., Any], arguments: Arguments) -> None:
    """The native op writes every element of its outputs and touches nothing outside them."""
    args, options = arguments

    def change(value: Any) -> Any:
        if isinstance(value, Tensor):
            return guarded(value) if is_dense(value) else value
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(change(item) for item in value))
        return value

    with use_backend("native"):
        plain = op(*args, **options)
        inside = [change(value) for value in args]
        inside_options = {name: change(value) for name, value in options.items()}
        memory = GuardedMemory()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", memory.empty)
            patch.setattr(torch, "empty_like", memory.empty_like)
            result = op(*inside, **inside_options)
    assert memory.check() > 0, "no output was allocated in guarded memory"
    for output in outputs_of(result):
        assert not output.isnan().any(), "an element was not written, or read from outside"
    assert same_bits(plain, result), "the result depends on the memory around the tensors"


def is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and is_nhwc(tensor))


def gradient_function(op: Callable[..., Any]) -> Callable[..., Any]:
    """``op`` followed by its gradients: (tensors, options) -> outputs and gradients, in order.

    The incoming gradient is the same smooth function of the position for every dtype.
    """

    def run(tensors: dict[str, Tensor | None], options: dict[str, Any]) -> tuple[Tensor, ...]:
        leaves = {
            name: None if value is None else value.detach().requires_grad_()
            for name, value in tensors.items()
        }
        outputs = outputs_of(op(**leaves, **options))
        incoming = [
            torch.linspace(-1, 1.5, o.numel(), dtype=torch.float64).cos().view(o.shape).to(o.dtype)
            for o in outputs
        ]
        wanted = [leaf for leaf in leaves.values() if leaf is not None]
        return torch.autograd.grad(outputs, wanted, incoming)

    return run
