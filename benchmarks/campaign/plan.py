"""Which cases the stages have, the most important ones first."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .counters import Counted
from .layers import Elementwise, LayerCase, distinct_layers
from .models import ModelCase

# stage -> its share of the time budget; what a stage leaves over goes to those after it.
STAGES = {
    "build": 0.06,
    "ceilings": 0.02,
    "parity": 0.20,
    "sanitizer": 0.11,
    "autotune": 0.13,
    "kernels": 0.13,
    "counters": 0.07,
    "inference": 0.19,
    "training": 0.08,
    "summary": 0.01,
}
# Of B0's heaviest layers: torch.compile takes a second for each.
COMPILED_LAYERS = 10


@dataclass(frozen=True)
class Plan:
    """Everything that a campaign measures.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for a rehearsal of the machinery.
        dtype: of tensors, of autocast in training.
        backends: that single layers run on, those of the first are tuned; networks choose by
            themselves.
        install: compile and install this checkout first.
        copy_bytes, product_sides: of the ceilings; dtype -> side of the square matrices.
        parity: pytest's arguments.
        kernels: layers.
        inference, training: networks.
        autotune_layers, autotune_models: what the autotuner sees; models with whether they train.
        precompiled: networks that torch.compile works on beside the parity tests, likewise.
        sanitized: pytest's arguments under Compute Sanitizer; none: it needs a GPU.
        counted: the layers that Nsight Compute looks into; None: it needs a GPU.
    """

    device: str
    dtype: str
    backends: tuple[str, ...]
    install: bool
    copy_bytes: int
    product_sides: dict[str, int]
    parity: tuple[str, ...]
    kernels: tuple[LayerCase, ...]
    inference: tuple[ModelCase, ...]
    training: tuple[ModelCase, ...]
    autotune_layers: tuple[LayerCase, ...]
    autotune_models: tuple[tuple[ModelCase, bool], ...]
    precompiled: tuple[tuple[ModelCase, bool], ...] = ()
    sanitized: tuple[str, ...] = ()
    counted: Counted | None = None


def layer_cases(
    network: str, batch: int, backward: bool = False, compiled: int = 0
) -> list[LayerCase]:
    """The distinct layers of a network, the heaviest first, ``compiled`` of them also compiled."""
    return [
        LayerCase(network, layer, batch, backward, index < compiled)
        for index, layer in enumerate(distinct_layers(network, batch))
    ]


def each_once(cases: list[LayerCase]) -> tuple[LayerCase, ...]:
    """Without layers that an earlier network has, too."""
    seen: dict[object, LayerCase] = {}
    for case in cases:
        seen.setdefault((case.layer, case.batch, case.backward), case)
    return tuple(seen.values())


def elementwise_cases(batch: int) -> list[LayerCase]:
    """Activation and BatchNorm on B0's largest tensors, forward and backward."""
    found = []
    for op in ("silu", "batch_norm_act", "batch_norm_act training"):
        for channels, side in ((96, 112), (144, 56), (672, 14)):
            for backward in (False, True):
                if not backward or op != "batch_norm_act":
                    layer = Elementwise(op, channels, side, side)
                    found.append(LayerCase("efficientnet_b0", layer, batch, backward))
    return found


def full_plan() -> Plan:
    """What one GPU is measured by.

    B7 at 600² runs with 8 and 64 images where others have 32 and 256.
    """
    b0, b2, b4, b7 = (f"efficientnet_b{index}" for index in (0, 2, 4, 7))
    lite0, resnet, mobilenet = "efficientnet_lite0", "resnet50", "mobilenet_v2"
    kernels = [
        *layer_cases(b0, 256, compiled=COMPILED_LAYERS),
        *elementwise_cases(256),
        *layer_cases(b0, 1),
        *layer_cases(b0, 256, backward=True),
        *layer_cases(resnet, 256),
        *layer_cases(b4, 256),
        *layer_cases(mobilenet, 256),
        *layer_cases(b7, 256),
        *(case for name in (resnet, b4, mobilenet, b7) for case in layer_cases(name, 1)),
    ]
    batches = [
        *((b0, 256), (b0, 1), (b7, 64), (resnet, 256), (b4, 256), (lite0, 256), (b2, 256)),
        *((b0, 32), (resnet, 1), (b4, 1), (b7, 1), (lite0, 1), (b2, 1)),
        *((resnet, 32), (b4, 32), (b7, 8), (lite0, 32), (b2, 32)),
    ]
    main = [ModelCase(*case) for case in batches]
    first = [
        main[0],
        replace(main[0], kind="max-autotune"),
        main[1],
        replace(main[1], kind="max-autotune"),
        replace(main[0], kind="compile"),
        replace(main[1], kind="compile"),
    ]
    inference = [
        *first,
        *main[2:],
        *(replace(case, kind="compile") for case in main[2:8]),
        *(ModelCase(name, 256, "max-autotune") for name in (resnet, b4)),
        *(replace(case, kind="compile") for case in main[8:]),
    ]
    steps = [ModelCase(b0, 256), ModelCase(b4, 64), ModelCase(resnet, 256)]
    training = [
        steps[0],
        replace(steps[0], kind="compile"),
        *steps[1:],
        *(replace(case, kind="compile") for case in (steps[2], steps[1])),
    ]
    return Plan(
        device="cuda",
        dtype="bfloat16",
        backends=("triton", "native"),
        install=True,
        copy_bytes=2 << 30,
        product_sides={"bfloat16": 8192, "float16": 8192, "tf32": 8192},
        # Ahead-of-time compilation for other GPUs tells nothing here and takes minutes.
        parity=(
            "tests/triton",
            "tests/cuda",
            "tests/gpu",
            "-k",
            "not as_promised and not mistakes",
        ),
        kernels=each_once(kernels),
        inference=tuple(inference),
        training=tuple(training),
        autotune_layers=each_once(
            [
                *(case for batch in (256, 1) for case in layer_cases(b0, batch)),
                *layer_cases(b0, 256, backward=True),
                *layer_cases(resnet, 256),
                *layer_cases(b4, 256),
                *layer_cases(mobilenet, 256),
                *layer_cases(b7, 256),
                *(c for name in (resnet, b4, mobilenet, b7) for c in layer_cases(name, 1)),
            ]
        ),
        autotune_models=(
            (ModelCase(b0, 256), False),
            (ModelCase(b0, 1), False),
            (steps[0], True),
            (ModelCase(b7, 64), False),
            (steps[1], True),
            *((case, False) for case in main[3:8]),
        ),
        precompiled=(
            *((main[0], False), (steps[0], True), (main[1], False), (steps[2], True)),
            *((main[3], False), (steps[1], True), (main[2], False), (main[4], False)),
        ),
        # As `make test-asan`: of what runs on a GPU.
        sanitized=(
            "tests/cuda",
            "--ignore=tests/cuda/test_compiled.py",
            "--ignore=tests/cuda/test_emulation.py",
            "-k",
            "not opcheck and not compile and not mistakes",
        ),
        counted=Counted(b0, 256, forward=8, backward=4),
    )


def rehearsal_plan() -> Plan:
    """Small sizes on the CPU, in a minute: shows that the machinery works, measures nothing."""
    network = "mobilenet_v2@32"
    layers = each_once([*layer_cases(network, 2)[:3], *layer_cases(network, 2, True)[:1]])
    return Plan(
        device="cpu",
        dtype="float32",
        backends=("auto",),
        install=False,
        copy_bytes=1 << 22,
        product_sides={"float32": 256},
        parity=("tests/test_harness.py", "-k", "statistics"),
        kernels=(*layers, LayerCase(network, Elementwise("silu", 16, 8, 8), 2)),
        inference=(ModelCase(network, 2),),
        training=(ModelCase(network, 4),),
        autotune_layers=layers[:1],
        autotune_models=((ModelCase(network, 1), False),),
    )
