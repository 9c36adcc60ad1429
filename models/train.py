"""``python -m effkernels.models.train``: train a network on a dataset.

All the work is in ``effkernels.models.training``; this turns words into a ``TrainConfig``.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

from effkernels.models.training import Interrupted, NonFiniteLoss, TrainConfig, train
from effkernels.models.training.config import (
    AUGMENTATIONS,
    DATASETS,
    DTYPES,
    OPTIMIZERS,
    SCHEDULES,
)
from effkernels.models.training.distributed import ranks_from_environment

__all__ = ["main"]

EPILOG = """\
exit status: 0 done (or stopped by --limit-steps), 1 the loss is not finite, 2 something is not
accepted, 130 interrupted after saving a checkpoint.

examples:
  python -m effkernels.models.train resnet18 --model-option stem=cifar --dataset cifar10 \\
      --data ~/data --download --out runs/resnet18 --epochs 30 --lr 0.1
  torchrun --nproc-per-node 8 -m effkernels.models.train efficientnet_b0 --dataset imagenet \\
      --data /data/imagenet --out runs/b0 --epochs 350 --optimizer rmsprop --schedule step \\
      --warmup-epochs 5 --ema-decay 0.9999 --augment autoaugment --dtype bfloat16 --workers 8
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    Args:
        arguments: words after the program's name; ``sys.argv[1:]`` if None.
    """
    words = vars(_parser().parse_args(arguments))
    if words["coefficients"] is not None:
        words["coefficients"] = tuple(words["coefficients"])
    try:
        first = ranks_from_environment().first
        train(TrainConfig(**words), _print if first else _ignore)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        return 130
    except NonFiniteLoss as error:
        print(error, file=sys.stderr)
        return 1
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _print(line: str) -> None:
    print(line, flush=True)


def _ignore(line: str) -> None:
    pass


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.models.train",
        description="Train a network; several processes if started by torchrun.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="one of effkernels.models.list_models()")
    group = parser.add_argument_group("network")
    _option(group, "phi", float, "PHI", "compound scaling of the network and the pictures")
    group.add_argument(
        "--coefficients",
        type=float,
        nargs=3,
        metavar=("ALPHA", "BETA", "GAMMA"),
        help="of --phi; default: the paper's",
    )
    group.add_argument("--num-classes", type=int, metavar="N", help="default: the dataset's")
    group.add_argument(
        "--model-option",
        action=_Option,
        dest="model_options",
        metavar="NAME=VALUE",
        default={},
        help="further argument of create_model, as stem=cifar; may be repeated",
    )
    group.add_argument("--weights", metavar="FILE", help="checkpoint to fine-tune from")

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", required=True, choices=DATASETS)
    group.add_argument("--data", required=True, metavar="PATH", help="its folder, or .npz file")
    _flag(group, "download", "fetch it into the folder first")
    _option(group, "resolution", int, "pixels", "default: the pictures' own, or the model's")
    _option(group, "fraction", float, "F", "part of the training pictures")
    _option(group, "augment", str, None, "", AUGMENTATIONS)
    _option(group, "batch-size", int, "N", "pictures per forward pass and process")
    _option(group, "workers", int, "N", "processes that load pictures")

    group = parser.add_argument_group("optimization")
    _option(group, "epochs", int, "N", "passes over the training pictures")
    _option(group, "limit-steps", int, "N", "stop after this step, with a checkpoint")
    _option(group, "accumulate", int, "N", "forward passes per step")
    _option(group, "optimizer", str, None, "", OPTIMIZERS)
    _option(group, "lr", float, "LR", "peak learning rate; default: the optimizer's usual one")
    _option(group, "layer-decay", float, "D", "learning rate of a layer over the next one's")
    _option(group, "momentum", float, "M", "of sgd and rmsprop")
    _flag(group, "nesterov", "of sgd")
    _option(group, "weight-decay", float, "D", "default: the optimizer's usual one")
    _option(group, "schedule", str, None, "of the learning rate", SCHEDULES)
    _option(group, "warmup-epochs", float, "N", "of a growing learning rate")
    _option(group, "decay-rate", float, "R", "factor of --schedule step")
    _option(group, "decay-epochs", float, "N", "how often --schedule step multiplies by it")
    _option(group, "label-smoothing", float, "S", "of the cross entropy")
    _option(group, "mixup", float, "A", "mixup's alpha; 0: none")
    _option(group, "ema-decay", float, "D", "of averaged weights; 0: none")
    _flag(group, "freeze-bn", "BatchNorms keep their running statistics")

    group = parser.add_argument_group("machine")
    _option(group, "device", str, "D", "auto, cpu, cuda or cuda:N")
    _option(group, "dtype", str, None, "of autocast", DTYPES)
    group.add_argument(
        "--accelerate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="this library's kernels, or plain PyTorch (default: --accelerate)",
    )
    _flag(group, "sync-bn", "BatchNorm statistics over all processes")
    _flag(group, "deterministic", "equal bits on a GPU, too")
    _option(group, "seed", int, "N", "of everything random")

    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", required=True, metavar="FOLDER", help="for checkpoints, history and curves"
    )
    _flag(group, "resume", "continue the run in --out")
    _option(group, "log-every", int, "N", "steps from one noted loss to the next")
    return parser


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}


def _option(
    group: argparse._ArgumentGroup,
    name: str,
    kind: type,
    metavar: str | None,
    help: str,
    choices: Sequence[str] | None = None,
) -> None:
    """An option whose default is the dataclass's."""
    default = _DEFAULTS[name.replace("-", "_")]
    if default is not None:
        help = f"{help} (default: {default})".lstrip()
    group.add_argument(
        f"--{name}", type=kind, metavar=metavar, default=default, choices=choices, help=help
    )


def _flag(group: argparse._ArgumentGroup, name: str, help: str) -> None:
    group.add_argument(f"--{name}", action="store_true", help=help)


class _Option(argparse.Action):
    """NAME=VALUE into a dict; a value is a Python number or name, or else a string."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        name, equals, text = values.partition("=")
        if not name.isidentifier() or not equals:
            parser.error(f"--model-option: {values!r} is given, NAME=VALUE is accepted")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), name: value})


if __name__ == "__main__":
    sys.exit(main())
