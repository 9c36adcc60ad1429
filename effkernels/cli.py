"""The ``effkernels`` command: ``info``, ``summary``, ``scale``, ``explain`` and ``classify``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (2 for an error the user can act on).

    Args:
        arguments: words after the program's name; ``sys.argv[1:]`` if None.
    """
    parsed = _parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except BrokenPipeError:
        # The reader (`head`) has left. Closing stderr keeps Python from reporting it at exit.
        sys.stderr.close()
        return 141
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        print(f"effkernels: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effkernels", description="EfficientNet kernels.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="versions, what was built, CPU, backends, threads")
    info.add_argument("--json", action="store_true", help="print as JSON")
    info.set_defaults(run=_info)

    model_help = "one of effkernels.models.list_models(), torchvision:NAME or timm:NAME"
    summary = commands.add_parser("summary", help="a network's layers, parameters, memory")
    summary.add_argument("model", metavar="MODEL", help=model_help)
    summary.add_argument("--num-classes", type=int, metavar="N", help="outputs (default: 1000)")
    summary.set_defaults(run=_summary)

    scale = commands.add_parser("scale", help="compound-scaled networks, by phi or by a budget")
    _add_scale_arguments(scale)
    scale.set_defaults(run=_scale)

    explain = commands.add_parser("explain", help="what runs in a network, and why")
    explain.add_argument("model", metavar="MODEL", help=model_help)
    explain.add_argument("--profile", action="store_true", help="measure every row's time")
    explain.set_defaults(run=_explain)
    for command in (summary, explain):
        command.add_argument(
            "--input", metavar="CxHxW", help="an image's shape (default: the model's own)"
        )
        command.add_argument("--json", action="store_true", help="print as JSON")

    classify = commands.add_parser("classify", help="name what photographs show")
    classify.add_argument("photos", nargs="+", metavar="PHOTO", help="image file")
    classify.add_argument(
        "--model", default="efficientnet_lite0", help="network (default: %(default)s)"
    )
    classify.add_argument(
        "--weights", metavar="FILE", help="checkpoint (default: the model's own weights)"
    )
    classify.add_argument(
        "--top", type=int, default=5, metavar="N", help="classes to print (default: %(default)s)"
    )
    classify.set_defaults(run=_classify)
    return parser


def _add_scale_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", required=True, metavar="NAME", help="network that is scaled")
    parser.add_argument(
        "--phi", type=float, nargs="+", metavar="PHI", help="how far (default: 0 1 2, or a budget)"
    )
    budget = parser.add_argument_group("budget", "the largest network that keeps to all of these")
    budget.add_argument("--flops", help="per image, two per multiply-add: 4G")
    budget.add_argument("--macs", help="per image, multiply-adds, which papers call FLOPs: 2G")
    budget.add_argument("--params", help="parameters: 10M")
    budget.add_argument("--memory", help="at the peak of --mode, predicted: 8GB, 512MiB")
    budget.add_argument("--latency", help="of a batch in evaluation mode, measured: 20ms")
    budget.add_argument("--mode", default="inference", help="inference (default) or training")
    parser.add_argument("--alpha", type=float, help="of depth (default: the paper's 1.2)")
    parser.add_argument("--beta", type=float, help="of width (default: 1.1)")
    parser.add_argument("--gamma", type=float, help="of resolution (default: 1.15)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: %(default)s)")
    parser.add_argument("--num-classes", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--stem", help="of ResNets: imagenet (default) or cifar")
    parser.add_argument("--optimizer", default="sgd", help="sgd (default, with momentum) or adam")
    parser.add_argument(
        "--no-measure", action="store_true", help="run nothing: for another machine than this one"
    )
    parser.add_argument("--json", action="store_true", help="print as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw costs against phi")


# Imports are inside, so that one command does not wait for what only another needs.


def _info(parsed: argparse.Namespace) -> None:
    from .info import collect, render

    info = collect()
    print(json.dumps(info, indent=2) if parsed.json else render(info))


def _summary(parsed: argparse.Namespace) -> None:
    import torch

    from .models import summary

    options = {} if parsed.num_classes is None else {"num_classes": parsed.num_classes}
    with torch.device("meta"):
        model = _model(parsed.model, options)
    result = summary(model, _input_shape(parsed.input, model))
    print(json.dumps(result.to_dict(), indent=2) if parsed.json else result)


def _scale(parsed: argparse.Namespace) -> None:
    from . import scale

    scale.run(parsed)


def _explain(parsed: argparse.Namespace) -> None:
    import torch

    from . import accelerate, explain

    model = accelerate(_model(parsed.model, {}).eval())
    image = torch.randn(1, *_input_shape(parsed.input, model))
    report = explain(model, image, profile=parsed.profile)
    print(json.dumps(report.to_dict(), indent=2) if parsed.json else report)


def _model(name: str, options: dict[str, Any]) -> nn.Module:
    """The network called ``name``, perhaps of another library."""
    library, _, rest = name.rpartition(":")
    if not library:
        from .models import create_model

        return create_model(name, **options)
    if library == "torchvision":
        from torchvision.models import get_model

        return get_model(rest, weights=None, **options)
    if library == "timm":
        import timm

        return timm.create_model(rest, **options)
    raise ValueError(f"MODEL: library {library!r} is not known, torchvision and timm are accepted")


def _input_shape(text: str | None, model: nn.Module) -> tuple[int, ...]:
    if text is None:
        size = getattr(getattr(model, "data_config", None), "resolution", 224)
        return 3, size, size
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(f"--input: {text!r} is no image shape, CxHxW as in 3x224x224 is accepted")
    return tuple(map(int, sizes))


def _classify(parsed: argparse.Namespace) -> None:
    from .classify import classify

    classify(parsed.photos, model=parsed.model, weights=parsed.weights, top=parsed.top)


if __name__ == "__main__":
    sys.exit(main())
