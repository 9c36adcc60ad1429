"""Builds the kernels in place: `python -m build_tools [--sanitize] [--output DIRECTORY]`."""

from __future__ import annotations

import argparse
from pathlib import Path

from build_tools.native import ROOT, BuildError, build, requested, summary


def main() -> None:
    """Builds what EFFKERNELS_BUILD asks for, recompiling only what changed."""
    parser = argparse.ArgumentParser(prog="python -m build_tools", description=main.__doc__)
    parser.add_argument(
        "--output", type=Path, default=ROOT / "effkernels", help="directory for the library"
    )
    parser.add_argument(
        "--sanitize", action="store_true", help="with AddressSanitizer and UBSan, unoptimised"
    )
    arguments = parser.parse_args()
    try:
        info = build(arguments.output.resolve(), requested(), sanitize=arguments.sanitize)
    except BuildError as error:
        raise SystemExit(f"effkernels: error: {error}") from None
    print(summary(info))


if __name__ == "__main__":
    main()
