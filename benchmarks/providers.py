"""The ways to run one network: PyTorch's, other runtimes', and this library's.

All start from the same module and the same weights, and get the same image. A provider prepares
whatever it can (conversion, compilation, layouts) and returns a function that runs the network.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

import effkernels as ek

Call = Callable[[], Any]


class NotAvailable(RuntimeError):
    """Why a provider cannot run here."""


@dataclass(frozen=True)
class Workload:
    """A network in evaluation mode, and its input."""

    name: str  # of the architecture
    network: nn.Module
    image: Tensor  # [N, 3, H, W], contiguous
    threads: int
    onnx_file: Path  # written by export_onnx


def eager(work: Workload) -> Call:
    """The module as it is."""
    return lambda: work.network(work.image)


def eager_channels_last(work: Workload) -> Call:
    """The module and its input in channels_last."""
    network, image = _channels_last(work)
    return lambda: network(image)


def compiled(work: Workload) -> Call:
    """``torch.compile`` as it comes, in channels_last."""
    return _compile(work)


def compiled_freezing(work: Workload) -> Call:
    """``torch.compile`` with Inductor's freezing: constants folded, weights packed."""
    call = _compile(work)
    # Not as an option of torch.compile: Dynamo reads it, too, and only from here.
    with torch._inductor.config.patch(freezing=True), torch.inference_mode():
        call()
    return call


def onnxruntime(work: Workload) -> Call:
    """ONNX Runtime's CPU provider, all graph optimisations."""
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = work.threads
    options.inter_op_num_threads = 1
    session = runtime.InferenceSession(_exported(work), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: work.image.numpy()}
    return lambda: session.run(None, feed)[0]


def openvino(work: Workload) -> Call:
    """OpenVINO's CPU plugin, for latency, computing in float32 as everyone else does."""
    runtime = _import("openvino")
    core = runtime.Core()
    compiled = core.compile_model(
        core.read_model(_exported(work)),
        "CPU",
        {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_NUM_THREADS": str(work.threads),
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    image = work.image.numpy()
    return lambda: compiled(image, share_inputs=True, share_outputs=True)[0]


def effkernels(work: Workload) -> Call:
    """The library's own network with these weights, in evaluation mode; nothing is converted."""
    if work.name not in ek.models.list_models():
        raise NotAvailable(f"effkernels.models has no {work.name}")
    norm = next(m for m in work.network.modules() if isinstance(m, nn.BatchNorm2d))
    network = ek.models.create_model(work.name, bn_eps=norm.eps).to(work.image.dtype)
    ek.models.load_checkpoint(network, work.network.state_dict())
    network.eval()
    return lambda: network(work.image)


def accelerate(work: Workload) -> Call:
    """``effkernels.accelerate`` on the module: parameters stay trainable."""
    network = _of_effkernels("accelerate")(copy.deepcopy(work.network))
    return lambda: network(work.image)


def freeze(work: Workload) -> Call:
    """``effkernels.freeze`` of the module: BatchNorm folded, weights packed."""
    network = _of_effkernels("freeze")(copy.deepcopy(work.network))
    return lambda: network(work.image)


PROVIDERS: dict[str, Callable[[Workload], Call]] = {
    "eager": eager,
    "eager channels_last": eager_channels_last,
    "torch.compile": compiled,
    "torch.compile freezing": compiled_freezing,
    "ONNX Runtime": onnxruntime,
    "OpenVINO": openvino,
    "effkernels": effkernels,
    "accelerate": accelerate,
    "freeze": freeze,
}
EXPORTED = ("ONNX Runtime", "OpenVINO")
RIVALS = tuple(PROVIDERS)[:6]
OWN = tuple(PROVIDERS)[6:]
CONTROL = "control"  # one of them once more


def in_order(names: Iterable[str]) -> list[str]:
    """``names`` once each, without the control: rivals, those of other suites, this library."""
    found = [name for name in dict.fromkeys(names) if name != CONTROL]
    others = [name for name in found if name not in PROVIDERS]
    return [name for name in (*RIVALS, *others, *OWN) if name in found]


def with_control(calls: Mapping[str, Call]) -> tuple[dict[str, Call], str]:
    """``calls`` with the last one entered once more as CONTROL, and that one's name.

    The control stands right behind the other runtimes, the one that it repeats does not: if their
    threads slowed down what follows, the control's ratio would show it.
    """
    repeated = list(calls)[-1]
    rivals = {name: call for name, call in calls.items() if name in RIVALS}
    return {**rivals, CONTROL: calls[repeated], **calls}, repeated


def export_onnx(network: nn.Module, image: Tensor, file: Path) -> None:
    """Write ``network`` for ``image``'s shape.

    PyTorch's older exporter, as long as there is one: it folds the BatchNorms into the weights,
    which both runtimes are faster with.
    """
    _import("onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (image,), str(file), dynamo=False)


def _exported(work: Workload) -> str:
    _import("onnx")  # without it, nothing was written
    if work.image.dtype != torch.float32:
        raise NotAvailable(f"float32 is compared with other runtimes, not {work.image.dtype}")
    return str(work.onnx_file)


def _compile(work: Workload) -> Call:
    network, image = _channels_last(work)
    function = torch.compile(network, dynamic=False)
    return lambda: function(image)


def _channels_last(work: Workload) -> tuple[nn.Module, Tensor]:
    network = copy.deepcopy(work.network).to(memory_format=torch.channels_last)
    return network, work.image.contiguous(memory_format=torch.channels_last)


def _of_effkernels(name: str) -> Callable[[nn.Module], nn.Module]:
    function = getattr(ek, name, None)
    if function is None:
        raise NotAvailable(f"effkernels {ek.__version__} has no {name}")
    return function


def _import(package: str) -> Any:
    try:
        return __import__(package)
    except ImportError as error:
        raise NotAvailable(f"{error}: pip install -e '.[peers]'") from None
