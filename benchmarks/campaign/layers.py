"""Single layers on a device: the stages ``autotune`` and ``kernels``."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import effkernels as ek
from effkernels.dispatch import operators
from effkernels.testing import relative_error

from ..gpus import Rates
from ..inference import make_record
from ..levels import block_parts
from ..networks import Network
from ..providers import CONTROL
from ..records import Case
from ..shapes import DIRECTORY, Layer, layers_of, read_layers
from .timing import CAPTURED_CALLS, Call, Memory, Stopwatch, captured, time_in_turns
from .worker import Row, in_words

FACTOR = 2.0  # our error may be this many times eager's in the same dtype, plus half an epsilon
SMALL_BATCH = 8  # up to it launching takes longer than computing: calls are captured in a graph
EAGER, COMPILED, OURS, CHAIN = "eager", "torch.compile", "effkernels", "unfused"
TUNING_S = 0.01  # of timing, for one configuration


@dataclass(frozen=True)
class Elementwise:
    """An op without weights to speak of, on a tensor as it comes in a network."""

    op: str  # silu, batch_norm_act (folded) or batch_norm_act training
    channels: int
    height: int
    width: int
    count: int = 1

    @property
    def label(self) -> str:
        """As a layer's."""
        return f"{self.op} {self.channels}x{self.height}x{self.width} silu"

    def flops(self, batch: int) -> int:
        """No multiply-adds worth counting."""
        return 0

    def bytes(self, batch: int, itemsize: int) -> int:
        """What must move: in training the statistics need a pass of their own."""
        passes = 3 if self.op.endswith("training") else 2
        return passes * batch * self.channels * self.height * self.width * itemsize

    def backward_bytes(self, batch: int, itemsize: int) -> int:
        """Likewise; sums over gradient and input come first in training."""
        passes = 5 if self.op.endswith("training") else 3
        return passes * batch * self.channels * self.height * self.width * itemsize

    def tensors(self, batch: int) -> dict[str, Tensor]:
        """Random input and parameters."""
        input = torch.randn(batch, self.channels, self.height, self.width)
        found = {"input": input.contiguous(memory_format=torch.channels_last)}
        if self.op != "silu":
            found["weight"] = 1 + 0.1 * torch.randn(self.channels)
            found["bias"] = 0.1 * torch.randn(self.channels)
        return found

    def run(self, tensors: dict[str, Tensor]) -> Tensor:
        """The op, by the backend in use."""
        if self.op == "silu":
            return ek.ops.silu(tensors["input"])
        mean, var, training = self._statistics(tensors["input"])
        return ek.ops.batch_norm_act(
            *(tensors["input"], tensors["weight"], tensors["bias"], mean, var, training),
            activation="silu",
        )

    def plain(self, tensors: dict[str, Tensor]) -> Tensor:
        """The same in plain PyTorch."""
        if self.op == "silu":
            return F.silu(tensors["input"])
        mean, var, training = self._statistics(tensors["input"])
        output = F.batch_norm(
            tensors["input"], mean, var, tensors["weight"], tensors["bias"], training
        )
        return F.silu(output)

    def _statistics(self, input: Tensor) -> tuple[Tensor | None, Tensor | None, bool]:
        if self.op.endswith("training"):
            return None, None, True
        return input.new_zeros(self.channels), input.new_ones(self.channels), False


Subject = Layer | Elementwise


@dataclass(frozen=True)
class LayerCase:
    """A layer of a network, forward or with its gradients alone."""

    network: str
    layer: Subject
    batch: int
    backward: bool = False
    compiled: bool = False  # torch.compile takes part

    @property
    def name(self) -> str:
        """Unique in a stage."""
        return f"{self.label}, batch {self.batch}"

    @property
    def label(self) -> str:
        """What records call it."""
        return f"{self.network}: {'backward of ' * self.backward}{self.layer.label}"

    def bytes(self, itemsize: int) -> int:
        """What must move once. Backward: the output's gradient and the input are read (the weight
        gradient needs both), the input's gradient is written, weights are read and written."""
        if not self.backward:
            return self.layer.bytes(self.batch, itemsize)
        if isinstance(self.layer, Elementwise):
            return self.layer.backward_bytes(self.batch, itemsize)
        inputs = self.batch * self.layer.channels * self.layer.height * self.layer.width
        return (self.layer.bytes(self.batch, itemsize)) + inputs * itemsize

    def flops(self) -> int:
        """Of the convolutions; a backward pass has two products for the forward's one."""
        return self.layer.flops(self.batch) * (2 if self.backward else 1)

    def floor_ms(self, rates: Rates, itemsize: int) -> float:
        """What the case takes at least; a block's depthwise part counts as matrix work."""
        on_tensor_cores = self.layer.op != "depthwise_conv"
        flops = self.flops()
        return rates.floor_ms(
            self.bytes(itemsize), flops * on_tensor_cores, flops * (not on_tensor_cores)
        )


def layer_counts(network: str) -> dict[Layer, int]:
    """How often a network has each of its layers and blocks."""
    label = Network.parse(network).label
    found = read_layers(label) if (DIRECTORY / f"{label}.csv").exists() else layers_of(label)
    merged: dict[Layer, int] = {}
    for layer in found:
        plain = replace(layer, count=1, in_block=False)
        merged[plain] = merged.get(plain, 0) + layer.count
    return merged


def distinct_layers(network: str, batch: int) -> list[Layer]:
    """Every layer and every block of a network, those that move the most bytes first."""
    merged = layer_counts(network)
    return sorted(merged, key=lambda layer: -merged[layer] * layer.bytes(batch, 1))


def plain(layer: Subject, tensors: dict[str, Tensor]) -> Tensor:
    """The layer in plain PyTorch, independent of this library: what is compared with."""
    if isinstance(layer, Elementwise):
        return layer.plain(tensors)
    if layer.op == "mbconv":
        return _plain_block(layer, tensors)
    input = tensors["input"]
    if layer.op == "squeeze_excite":
        reduced = F.conv2d(
            input.mean((2, 3), keepdim=True), tensors["reduce_weight"], tensors["reduce_bias"]
        )
        gate = F.conv2d(F.silu(reduced), tensors["expand_weight"], tensors["expand_bias"])
        return input * torch.sigmoid(gate)
    groups = layer.channels if layer.op == "depthwise_conv" else 1
    output = F.conv2d(
        input,
        tensors["weight"],
        tensors["bias"],
        layer.stride,
        layer.kernel_size // 2,
        groups=groups,
    )
    if "residual" in tensors:
        output = output + tensors["residual"]
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        **{"silu": F.silu, "relu": F.relu, "relu6": F.relu6},
        **{"hard_swish": F.hardswish, "sigmoid": torch.sigmoid},
    }
    return output if layer.activation == "none" else functions[layer.activation](output)


def _plain_block(block: Layer, tensors: dict[str, Tensor]) -> Tensor:
    output = tensors["input"]
    prefixes = {"squeeze_excite": "se"}
    for name, part in block_parts(block).items():
        prefix = f"{prefixes.get(name, name)}_"
        own = {
            key.removeprefix(prefix): value
            for key, value in tensors.items()
            if key.startswith(prefix)
        }
        own["input"] = output
        if part.residual:
            own["residual"] = tensors["input"]
        output = plain(part, own)
    return output


def measure_layer(
    case: LayerCase,
    device: str,
    dtype: str,
    backends: Sequence[str],
    rates: Rates,
    seconds: float,
) -> Iterator[Row]:
    """Check and time one layer by every provider; a row each and one of the control.

    Args:
        case: what.
        device: ``"cuda"`` or ``"cpu"``.
        dtype: of tensors and weights.
        backends: that our ops run on: the first as ``effkernels``, others, where they have kernels
            for the case, by their names, too.
        rates: of the device.
        seconds: for the timing, roughly.
    """
    tensors = tensors_of(case, device, dtype)
    key = Case("kernels", case.label, dtype, case.batch, 1, device)
    itemsize = getattr(torch, dtype).itemsize
    fields = {
        "bytes": case.bytes(itemsize),
        "flops": case.flops(),
        "floor_ms": case.floor_ms(rates, itemsize),
    }
    run = partial(plain, case.layer)
    functions: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {EAGER: run}
    if case.compiled and not case.backward:
        functions[COMPILED] = torch.compile(run, dynamic=False)
    functions |= ours_by_name(case, backends)
    errors, notes, calls = _check(case, functions, tensors)
    memory = Memory(device)
    peaks = {}
    context = nullcontext() if case.backward else torch.inference_mode()
    with context:
        for name in list(calls):
            memory.start()
            calls[name]()
            peaks[name] = memory.peak()
        per_call = 1
        if _is_captured(case, device):
            per_call = CAPTURED_CALLS
            for name in list(calls):
                try:
                    calls[name] = captured(calls[name], per_call)
                except Exception as error:
                    notes[name] = f"cannot be captured: {in_words(error)}"
                    del calls[name]
        timings = time_in_turns(
            calls, Stopwatch(device), seconds, cold=per_call == 1, per_call=per_call
        )
    last = list(calls)[-1] if calls else ""
    for name in [*functions, CONTROL]:
        same = last if name == CONTROL else name
        note = notes.get(name, "") if name != CONTROL or calls else "no provider could be timed"
        yield asdict(
            make_record(
                key,
                name,
                timings.get(name),
                **fields,
                rel_err=errors.get(same),
                control_of=last if name == CONTROL else "",
                note=note,
                peak_bytes=peaks.get(same),
            )
        )


def ours_by_name(
    case: LayerCase, backends: Sequence[str]
) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    """The providers that are this library."""
    first, *others = backends
    found = {OURS: partial(_ours, case.layer, backend=first)}
    for backend in others:
        operator = operators[case.layer.op.split()[0]]
        kernels = operator.cuda if backend == "native" else operator.implementations[backend]
        if kernels is not None and (kernels.backward or not case.backward):
            found[f"{OURS} {backend}"] = partial(_ours, case.layer, backend=backend)
            if isinstance(case.layer, Layer) and case.layer.op == "mbconv":
                found[f"{CHAIN} {backend}"] = partial(_chain, case.layer, backend=backend)
    return found


def _chain(block: Layer, tensors: dict[str, Tensor], backend: str) -> Tensor:
    """The block with an op for each convolution, so that the expanded tensor goes through memory:
    what a kernel that fuses two of them has to beat."""
    parts = block_parts(block)
    own = {
        name: {
            key.removeprefix(f"{name}_"): tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}_")
        }
        for name in ("expand", "depthwise", "se", "project")
    }
    with ek.use_backend(backend):
        hidden = tensors["input"]
        if "expand" in parts:
            hidden = ek.ops.pointwise_conv(hidden, **own["expand"], activation=block.activation)
        hidden, mean = ek.ops.depthwise_conv(
            hidden,
            **own["depthwise"],
            stride=block.stride,
            activation=block.activation,
            return_mean=True,
        )
        gate = ek.ops.squeeze_excite_gate(mean, **own["se"]) if block.se_channels else None
        residual = tensors["input"] if block.residual else None
        return ek.ops.pointwise_conv(hidden, **own["project"], gate=gate, residual=residual)


def tune_layer(case: LayerCase, device: str, dtype: str, backend: str) -> Iterator[Row]:
    """Run a layer where the autotuner may measure; a row with what it decided."""
    from effkernels.triton import tune

    tensors = tensors_of(case, device, dtype)
    stopwatch = Stopwatch(device)
    before = tuned_table(device)
    start = time.monotonic()
    table = str(table_path(device))
    with tune.tuning(partial(stopwatch.median, seconds=TUNING_S, cold=True)):
        run = partial(_ours, case.layer, backend=backend)
        if case.backward:
            gradients(run, tensors)()
        else:
            with torch.no_grad():
                run(tensors)
    after = tuned_table(device)
    new = {key: config for key, config in after.items() if key not in before}
    yield {"case": case.name, "seconds": time.monotonic() - start, "tuned": new, "table": table}


def tuned_table(device: str) -> dict[str, Any]:
    """What was tuned on this machine's device so far."""
    path = table_path(device)
    return json.loads(path.read_text()) if path.exists() else {}


def table_path(device: str) -> Path:
    """Where the autotuner keeps it."""
    from effkernels.triton import launch, tune

    found = launch.device_of(torch.empty(0, device=device))
    return tune.cache_directory() / tune.table_name(found)


def _is_captured(case: LayerCase, device: str) -> bool:
    return device == "cuda" and case.batch <= SMALL_BATCH and not case.backward


def _ours(layer: Subject, tensors: dict[str, Tensor], backend: str) -> Tensor:
    with ek.use_backend(backend):
        return layer.run(tensors)


def tensors_of(case: LayerCase, device: str, dtype: str) -> dict[str, Tensor]:
    """The case's input and parameters, the same ones every time."""
    torch.manual_seed(0)
    with torch.device(device):
        found = case.layer.tensors(case.batch)
        tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in found.items()}
    if case.backward:
        for tensor in tensors.values():
            tensor.requires_grad_()
    return tensors


def gradients(
    function: Callable[[dict[str, Tensor]], Tensor],
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None = None,
) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone, as a function that can be called again.

    ``dtype``: what the output's gradient is rounded to, if not the output's own.
    """
    output = function(tensors)
    generator = torch.Generator(output.device).manual_seed(1)
    upstream = torch.randn(output.shape, device=output.device, generator=generator)
    upstream = upstream.to(dtype or output.dtype).to(output.dtype)
    upstream = upstream.contiguous(memory_format=torch.channels_last)
    leaves = list(tensors.values())
    return lambda: torch.autograd.grad(output, leaves, upstream, retain_graph=True)


def _check(
    case: LayerCase,
    functions: dict[str, Callable[[dict[str, Tensor]], Tensor]],
    tensors: dict[str, Tensor],
) -> tuple[dict[str, float], dict[str, str], dict[str, Call]]:
    """Errors against higher precision, what is wrong, and the calls that may be timed."""
    images = sorted({0, case.batch - 1})  # the last one has the largest offsets
    with exactly():
        exact = _exact_gradients(case, tensors) if case.backward else _exact(case, tensors, images)
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    calls: dict[str, Call] = {}
    eager: Sequence[Tensor] | None = None
    allowed = 0.0  # without eager's result nothing is known to be right
    for name, function in functions.items():
        try:
            with nullcontext() if case.backward else torch.inference_mode():
                result = partial(function, tensors)
                if case.backward:
                    result = gradients(function, tensors)
                outputs = result()
        except Exception as error:
            notes[name] = in_words(error)
            continue
        if not case.backward:
            outputs = [outputs]
        whole = outputs
        if not case.backward and len(outputs[0]) != len(exact[0]):
            outputs = [outputs[0][images]]
        found = [relative_error(output, due) for output, due in zip(outputs, exact, strict=True)]
        epsilon = torch.finfo(tensors["input"].dtype).eps
        if name == EAGER:
            eager = whole
            allowed = FACTOR * worst(found) + 0.5 * epsilon + 1e-6
        elif eager is not None and not case.backward:
            # Images in between are compared with eager's, and both may be off.
            found.append(difference(whole[0], eager[0]) - 2 * allowed)
        errors[name] = worst(found)
        if errors[name] <= allowed or name == EAGER:
            calls[name] = result
        else:
            notes[name] = f"WRONG: relative error {errors[name]:.1e}, {allowed:.1e} is allowed"
    return errors, notes, calls


def worst(errors: Sequence[float]) -> float:
    """The largest one, NaN if there is one."""
    return max(errors, key=lambda error: (math.isnan(error), error))


def difference(output: Tensor, other: Tensor) -> float:
    """‖output − other‖ / ‖other‖, some images at a time: in float64 all would not fit."""
    difference = norm = 0.0
    for part, due in zip(output.split(8), other.split(8), strict=True):
        difference += float((part.double() - due.double()).square().sum())
        norm += float(due.double().square().sum())
    return (difference / max(norm, 1e-300)) ** 0.5


def _exact(case: LayerCase, tensors: dict[str, Tensor], images: Sequence[int]) -> list[Tensor]:
    """Outputs in float64: of the first and the last image, where images do not mix."""
    whole = ("batch_norm_act training",)
    with torch.no_grad():
        doubles = {
            name: (
                tensor[images] if tensor.dim() == 4 and name in ("input", "residual") else tensor
            )
            for name, tensor in tensors.items()
        }
        if case.layer.op in whole:
            return [plain(case.layer, {k: v.float() for k, v in tensors.items()})]
        return [plain(case.layer, {k: v.double() for k, v in doubles.items()})]


def _exact_gradients(case: LayerCase, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """In float32, or in float64 for float32: weights' gradients sum over the whole batch."""
    dtype = torch.float64 if tensors["input"].dtype == torch.float32 else torch.float32
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in tensors.items()}
    return gradients(partial(plain, case.layer), leaves, tensors["input"].dtype)()


class exactly:
    """Inside, float32 products are float32 products."""

    def __enter__(self) -> None:
        self._before = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *_: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before
