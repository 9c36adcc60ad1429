"""The ``effkernels`` command: ``info`` and ``classify``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

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


# Imports are inside, so that one command does not wait for what only another needs.


def _info(parsed: argparse.Namespace) -> None:
    from .info import collect, render

    info = collect()
    print(json.dumps(info, indent=2) if parsed.json else render(info))


def _classify(parsed: argparse.Namespace) -> None:
    from .classify import classify

    classify(parsed.photos, model=parsed.model, weights=parsed.weights, top=parsed.top)


if __name__ == "__main__":
    sys.exit(main())
