"""``python -m benchmarks models | peers | training | kernels | roofline | campaign | ...``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import gpus, inference, kernels, levels, limits, report, shapes, targets, training
from .campaign.plan import STAGES
from .machine import header
from .networks import Network
from .providers import OWN, PROVIDERS
from .records import Case, Results, load
from .study import command as study

TARGETS = Path(__file__).parent / "targets"
DTYPES = ("float32", "bfloat16")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a suite; 0, 1 if a case failed or a target was missed, 2 for bad input."""
    parsed = _parser().parse_args(arguments)
    try:
        return parsed.run(parsed)
    except (ValueError, OSError) as error:
        print(f"benchmarks: error: {error}", file=sys.stderr)
        return 2


def _networks(parsed: argparse.Namespace) -> int:
    """The suites ``models`` and ``peers``."""
    wanted, bounded = [], []
    if parsed.suite == targets.SUITE:
        wanted = targets.read_targets(parsed.targets or TARGETS / f"{parsed.device}.csv")
        bounded = _limits(parsed, f"{parsed.device}-limits.csv", limits.PROVIDER)
    if parsed.models:
        cases = [
            Case(parsed.suite, network.label, dtype, batch, threads, parsed.device)
            for network in parsed.models
            for dtype in parsed.dtype
            for batch in parsed.batch or [1]
            for threads in parsed.threads or [1]
        ]
    else:
        cases = _of_targets(parsed, (case for target in wanted for case in target.cases()))
    measured = [target for target in wanted if set(target.cases()) <= set(cases)]
    _needs_targets(parsed, [*measured, *bounded])
    results = _results(parsed)
    failures = inference.run(cases, parsed.providers, results, parsed.budget_s, parsed.rounds)
    failures += limits.run(bounded, results, parsed.budget_s, parsed.rounds)
    check = partial(targets.check, results, measured) if measured else None
    return _conclude(parsed, results, cases, bounded, failures, check)


def _conclude(
    parsed: argparse.Namespace,
    results: Results,
    cases: list[Case],
    bounded: list[limits.Limit],
    failures: list[str],
    check: Callable[[], tuple[str, bool]] | None,
) -> int:
    """Print and draw what was found; ``check`` gives the table of targets, if there are any."""
    print(f"\n{report.describe(results.header)}\n\n{report.network_tables(results, cases)}")
    limit_table, met = limits.table(results, bounded)
    if bounded:
        print(f"\n{limit_table}")
    if parsed.plot:
        from . import plots

        plots.speed(results, cases, parsed.plot)
    if not parsed.check:
        return 1 if failures else 0
    if check is not None:
        target_table, targets_met = check()
        print(f"\n{target_table}")
        met = met and targets_met
    return 0 if met and not failures else 1


def _training(parsed: argparse.Namespace) -> int:
    """The suite ``training``, on a CPU."""
    if parsed.device == "cuda":
        return _training_on_gpu(parsed)
    wanted = training.read_targets(parsed.targets or TARGETS / "cpu-training.csv")
    if parsed.models:
        cases = [
            Case(training.SUITE, network.label, "float32", batch, threads)
            for network in parsed.models
            for batch in parsed.batch or [training.BATCH]
            for threads in parsed.threads or [training.THREADS]
        ]
    else:
        cases = _of_targets(parsed, (case for target in wanted for case in target.cases()))
    measured = [target for target in wanted if set(target.cases()) <= set(cases)]
    bounded = _limits(parsed, "cpu-training-limits.csv", training.OURS)
    _needs_targets(parsed, [*measured, *bounded])
    results = _results(parsed)
    failures = training.run(cases, parsed.providers, results, parsed.budget_s, parsed.rounds)
    failures += limits.run(bounded, results, parsed.budget_s, parsed.rounds)
    check = partial(targets.check, results, measured) if measured else None
    return _conclude(parsed, results, cases, bounded, failures, check)


def _training_on_gpu(parsed: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA device, --device cpu is accepted")
    if parsed.threads or set(parsed.providers) != set(training.PROVIDERS):
        raise ValueError("--threads and --providers go with --device cpu")
    wanted = training.gpu_targets(parsed.targets or TARGETS / "gpu.csv")
    if parsed.models:
        cases = [
            training.gpu_case(network.label, batch)
            for network in parsed.models
            for batch in parsed.batch or [training.BATCH]
        ]
    else:
        cases = _of_targets(parsed, map(training.case_of, wanted))
    measured = [target for target in wanted if training.case_of(target) in cases]
    _needs_targets(parsed, measured)
    results = _results(parsed)
    failures = training.run_on_gpu(cases, results, parsed.budget_s)
    check = partial(training.check_on_gpu, results, measured) if measured else None
    return _conclude(parsed, results, cases, [], failures, check)


def _of_targets(parsed: argparse.Namespace, cases: Iterable[Case]) -> list[Case]:
    """The cases that targets are about, where no models are asked for."""
    if parsed.batch or parsed.threads:
        raise ValueError("--batch and --threads go with --models")
    return list(dict.fromkeys(cases))


def _needs_targets(parsed: argparse.Namespace, found: Sequence[Any]) -> None:
    if parsed.check and not found:
        raise ValueError("--check: no target is set for these models, batches and threads")


def _limits(parsed: argparse.Namespace, file: str, provider: str) -> list[limits.Limit]:
    """The limits of what is asked for: all, or those of some networks, batches and threads."""
    found = limits.read_limits(parsed.limits or TARGETS / file)
    if provider not in parsed.providers:
        return []
    if parsed.models:
        labels = {network.label for network in parsed.models}
        found = [limit for limit in found if limit.case in labels]
    return [
        limit
        for limit in found
        if limit.batch in (parsed.batch or [limit.batch])
        and limit.threads in (parsed.threads or [limit.threads])
    ]


def _layers(parsed: argparse.Namespace) -> int:
    """The suites ``kernels`` and ``roofline``."""
    if parsed.suite == "roofline" and (parsed.gpu or parsed.device in gpus.GPUS):
        parsed.gpu = parsed.gpu or parsed.device
        return _levels(parsed)
    view: Callable = shapes.unfused if parsed.unfused else shapes.fused
    if parsed.suite == "kernels":
        view = list
    # Everything is read before anything is measured.
    networks = [(Path(name).stem, view(shapes.read_layers(name))) for name in parsed.models]
    if parsed.ops:
        networks = [(n, [la for la in layers if la.op in parsed.ops]) for n, layers in networks]
    networks = [(name, layers) for name, layers in networks if layers]
    if not networks:
        raise ValueError(f"no layer of {', '.join(parsed.models)} is a {' or '.join(parsed.ops)}")
    results = _results(parsed)
    measured = []
    for name, layers in networks:
        for batch in parsed.batch or [1]:
            for threads in parsed.threads or [1]:
                cases = kernels.run(
                    parsed.suite,
                    name,
                    layers,
                    batch,
                    threads,
                    parsed.providers,
                    results,
                    parsed.rounds,
                )
                measured.append((layers, cases))
    print(f"\n{report.describe(results.header)}")
    for layers, cases in measured:
        print(f"\nbatch {cases[0].batch}, threads {cases[0].threads}")
        if parsed.suite == "kernels":
            print(report.kernel_table(results, cases))
        else:
            print(report.roofline_table(results, layers, cases))
    if parsed.plot:
        from . import plots

        for index, (_, cases) in enumerate(measured):
            numbered = f"{parsed.plot.stem}-{index}{parsed.plot.suffix}"
            path = parsed.plot if len(measured) == 1 else parsed.plot.with_name(numbered)
            plots.roofline(results, cases, path)
    return 0


def _levels(parsed: argparse.Namespace) -> int:
    """The suite ``roofline`` for a named GPU, which need not be there."""
    rates = gpus.named_rates(parsed.gpu)
    networks = [Network.parse(name).label for name in parsed.models]
    for index, name in enumerate(networks):
        for batch in parsed.batch or [256]:
            table = levels.table(name, rates, batch, parsed.itemsize, parsed.per, parsed.markdown)
            print("\n" * (index > 0) + table)
    return 0


def _campaign(parsed: argparse.Namespace) -> int:
    from .campaign import plan, report, run

    chosen = plan.rehearsal_plan() if parsed.device == "cpu" else plan.full_plan()
    if parsed.dry_run:
        print(report.dry_run(chosen, gpus.named_rates(parsed.gpu)))
        return 0
    if parsed.out is None:
        raise ValueError("--out DIR is needed, except with --dry-run")
    if parsed.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA device; --dry-run lists the cases without one")
    return run(chosen, parsed.out, parsed.only, parsed.budget_s)


def _report(parsed: argparse.Namespace) -> int:
    from .campaign import readme

    campaign = readme.load(parsed.results)
    if campaign is not None:
        section = readme.markdown(campaign)
        if parsed.readme is None:
            print(section)
        else:
            report.update_readme(parsed.readme, section, readme.BEGIN, readme.END)
        return 0
    results = Results({})
    results.header, results.records, results.limits = load(parsed.results)
    section = report.markdown(results, limits.read_limits(TARGETS / "cpu-limits.csv"))
    if parsed.readme is None:
        print(section)
    else:
        report.update_readme(parsed.readme, section)
    return 0


def _shapes(parsed: argparse.Namespace) -> int:
    shapes.write_all()
    return 0


def _results(parsed: argparse.Namespace) -> Results:
    return Results(header(), parsed.json, parsed.fresh)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measure effkernels and its rivals."
    )
    commands = parser.add_subparsers(required=True, metavar="SUITE")
    for suite, known, own, text in (
        (
            "models",
            PROVIDERS,
            ("eager", "eager channels_last", *OWN),
            "networks, by PyTorch and effkernels",
        ),
        ("peers", PROVIDERS, PROVIDERS, "networks, by every runtime; without --models all targets"),
        (
            training.SUITE,
            training.PROVIDERS,
            training.PROVIDERS,
            "training steps, by PyTorch and effkernels; without --models all targets",
        ),
    ):
        command = _suite(commands, suite, text, list(known), list(own))
        command.add_argument(
            "--models",
            type=_list(Network.parse),
            required=suite == "models",
            metavar="NAME[@PIXELS],...",
            help="networks, at their own resolution or another",
        )
        command.add_argument(
            "--budget-s",
            type=float,
            default=120.0 if suite == training.SUITE else 20.0,
            metavar="S",
            help="seconds that the timing of a case may take (default: %(default)s)",
        )
        if suite == "models":
            command.add_argument("--dtype", type=_list(_one_of(DTYPES)), default=["float32"])
            command.set_defaults(check=False)
        else:
            command.add_argument("--check", action="store_true", help="fail if a target is missed")
            for name in ("targets", "limits"):
                command.add_argument(
                    f"--{name}", type=Path, metavar="FILE.csv", help="other than benchmarks/targets"
                )
            command.set_defaults(dtype=["float32"])
        command.set_defaults(run=_training if suite == training.SUITE else _networks)
    for suite, text, default in (
        ("kernels", "single layers, against eager", list(shapes.NETWORKS)),
        (
            "roofline",
            "where a network's time goes, and what the machine can do",
            [shapes.NETWORKS[0]],
        ),
    ):
        names = list(kernels.PROVIDERS)
        command = _suite(commands, suite, text, names, names[suite == "roofline" :])
        command.add_argument(
            "--models",
            type=_list(str),
            default=default,
            metavar="NAME|FILE.csv,...",
            help="networks in benchmarks/shapes, or files like those",
        )
        command.add_argument("--ops", type=_list(_one_of(shapes.OPS)), default=[])
        if suite == "roofline":
            command.add_argument(
                "--unfused", action="store_true", help="blocks layer by layer, not as one op"
            )
            command.add_argument(
                "--gpu",
                choices=list(gpus.GPUS),
                help="reckon for this GPU instead of measuring, at every level of fusion",
            )
            command.add_argument(
                "--per", choices=["layer", "op"], default="layer", help="with --gpu: rows"
            )
            command.add_argument(
                "--markdown",
                action="store_true",
                help="with --gpu: the table alone, for a document",
            )
            command.add_argument(
                "--itemsize", type=int, choices=[2, 4], default=2, help="with --gpu: bytes a value"
            )
        command.set_defaults(run=_layers, unfused=False)
    text = "everything that a GPU can show, in stages, within minutes"
    command = commands.add_parser("campaign", help=text, description=text)
    command.add_argument("--out", type=Path, metavar="DIR", help="results; those there are kept")
    command.add_argument(
        "--only",
        nargs="+",
        choices=list(STAGES),
        default=[],
        metavar="STAGE",
        help=f"run these again, whatever is in DIR: {', '.join(STAGES)}",
    )
    command.add_argument(
        "--budget-s",
        type=float,
        default=570.0,
        metavar="S",
        help="seconds until no case is started any more (default: %(default)s)",
    )
    command.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal, small sizes"
    )
    command.add_argument("--dry-run", action="store_true", help="list every case with its floor")
    command.add_argument(
        "--gpu", choices=list(gpus.GPUS), default="h100", help="with --dry-run: whose floors"
    )
    command.set_defaults(run=_campaign)
    command = commands.add_parser("report", help="the README's tables from a results file")
    command.add_argument(
        "results",
        type=Path,
        metavar="RESULTS.json",
        help="a suite's, or a campaign's gpu-NAME.json",
    )
    command.add_argument("--readme", type=Path, help="write it there, between the markers")
    command.set_defaults(run=_report)
    study.add_parsers(commands)
    command = commands.add_parser("shapes", help="write benchmarks/shapes from the networks")
    command.set_defaults(run=_shapes)
    return parser


def _suite(
    commands: argparse._SubParsersAction,
    suite: str,
    text: str,
    providers: Sequence[str],
    default: Sequence[str],
) -> argparse.ArgumentParser:
    command = commands.add_parser(suite, help=text, description=text)
    command.set_defaults(suite=suite)
    others = {"roofline": list(gpus.GPUS), training.SUITE: ["cuda"]}
    devices = ["cpu", *others.get(suite, [])]
    command.add_argument("--device", choices=devices, default="cpu")
    trains = suite == training.SUITE
    batch, threads = (training.BATCH, training.THREADS) if trains else (1, 1)
    command.add_argument(
        "--batch", type=_list(_positive), metavar="N,...", help=f"default: {batch}"
    )
    command.add_argument(
        "--threads", type=_list(_positive), metavar="N,...", help=f"default: {threads}"
    )
    command.add_argument(
        "--providers",
        type=_list(_one_of(providers)),
        default=list(default),
        metavar="NAME,...",
        help=f"of {', '.join(providers)}",
    )
    command.add_argument("--rounds", type=_positive, metavar="N", help="passes over all providers")
    command.add_argument(
        "--json", type=Path, metavar="FILE", help="write records; a file that is there is continued"
    )
    command.add_argument("--fresh", action="store_true", help="start FILE over")
    command.add_argument("--plot", type=Path, metavar="FILE.png")
    return command


def _list(item: Callable) -> Callable[[str], list]:
    def parse(text: str) -> list:
        try:
            return list(dict.fromkeys(item(part.strip()) for part in text.split(",")))
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is given, a positive integer is accepted")
    return int(text)


def _one_of(accepted: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in accepted:
            raise ValueError(f"{text!r} is given, of {', '.join(accepted)} is accepted")
        return text

    return parse


if __name__ == "__main__":
    sys.exit(main())
