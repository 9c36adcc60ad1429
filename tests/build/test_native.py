"""Compiling: which units with which flags, what is recompiled, and what a failure leaves."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest

from build_tools import locate, native

pytestmark = pytest.mark.skipif(
    locate.find_compiler()[0] is None, reason="these tests compile, and there is no C++ compiler"
)


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("EFFKERNELS_BUILD", "CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)


def compiled(output: str) -> list[str]:
    """The units that a build's output says it compiled."""
    return sorted(line.split("] ")[1] for line in output.splitlines() if line.startswith("["))


def build(tree: Path, request: str = "cpu") -> dict[str, object]:
    return native.build(tree / "effkernels", request, root=tree)


def recorded(tree: Path) -> dict[str, dict[str, object]]:
    return json.loads((tree / "effkernels" / native.INFO).read_text())["modules"]


def test_request_is_checked() -> None:
    assert native.requested({}) == "auto"
    assert native.requested({"EFFKERNELS_BUILD": ""}) == "auto"
    for name in ("auto", "cpu", "cuda", "0"):
        assert native.requested({"EFFKERNELS_BUILD": name}) == name
    with pytest.raises(native.BuildError, match="=fast is not one of auto, cpu, cuda, 0"):
        native.requested({"EFFKERNELS_BUILD": "fast"})


@pytest.mark.parametrize(
    ("machine", "labels"),
    [
        ("x86_64", {"portable", "avx2", "avx512"}),
        ("aarch64", {"portable", "neon"}),
        ("riscv64", {"portable"}),
    ],
)
def test_one_unit_per_instruction_set(machine: str, labels: set[str]) -> None:
    isa_flags = native.ISA_FLAGS.get(machine, {"portable": ()})
    units = native.translation_units(native.ROOT, isa_flags)
    kernels = [unit for unit in units if unit.source.parts[1] not in ("bindings", "common")]
    assert {unit.label for unit in kernels} == labels
    assert len({unit.object_name for unit in units}) == len(units)
    for unit in kernels:
        assert f"-DEFFKERNELS_ISA={unit.label}" in unit.flags
    # Code that runs before the instruction set is chosen must run on any CPU, and only the
    # bindings may see torch.
    for unit in units:
        if unit not in kernels:
            assert not any(flag.startswith("-m") for flag in unit.flags)
        assert (unit.label == "bindings") == any("TORCH" in flag for flag in unit.flags)


def test_only_bindings_include_torch() -> None:
    for path in native.ROOT.glob("csrc/*/*"):
        if path.parent.name != "bindings":
            assert "<torch/" not in path.read_text(), path


def test_only_what_changed_is_recompiled(
    small_tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(small_tree)
    kernels = [f"csrc/silu/cpu.cpp ({isa})" for isa in native.ISA_FLAGS[platform.machine()]]
    everything = sorted([*kernels, "csrc/common/answer.cpp (common)"])
    assert compiled(capsys.readouterr().out) == everything
    library = small_tree / "effkernels" / native.LIBRARY
    first = library.read_bytes()

    build(small_tree)
    assert compiled(capsys.readouterr().out) == []

    (small_tree / "csrc/common/answer.cpp").write_text("int answer() { return 43; }\n")
    build(small_tree)
    assert compiled(capsys.readouterr().out) == ["csrc/common/answer.cpp (common)"]
    assert library.read_bytes() != first

    with open(small_tree / "csrc/common/name.h", "a") as header:
        header.write("// a header counts for everything\n")
    build(small_tree)
    assert compiled(capsys.readouterr().out) == everything


def test_flags_of_the_user_recompile(
    small_tree: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    build(small_tree)
    capsys.readouterr()
    monkeypatch.setenv("CXXFLAGS", "-DANSWER='4 2'")
    build(small_tree)
    assert len(compiled(capsys.readouterr().out)) > 0
    assert "'-DANSWER=4 2'" in str(recorded(small_tree)["cpu"]["flags"])


def test_failed_compilation(small_tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(small_tree)
    (small_tree / "csrc/common/answer.cpp").write_text("int answer() { return unknown_name; }\n")

    info = build(small_tree, "auto")
    reason = str(recorded(small_tree)["cpu"]["reason"])
    assert "csrc/common/answer.cpp (common) does not compile" in reason
    assert "unknown_name" in reason
    assert "\n" not in reason
    assert reason in native.summary(info)
    assert "unknown_name" in capsys.readouterr().out  # the compiler's own words
    # The library of the build before is gone: it would be loaded as if this build had made it.
    assert not (small_tree / "effkernels" / native.LIBRARY).exists()

    with pytest.raises(native.BuildError, match="CPU kernels not built: .*unknown_name"):
        build(small_tree, "cpu")
    assert recorded(small_tree)["cpu"]["built"] is False


def test_missing_kernel_is_a_link_error(small_tree: Path) -> None:
    (small_tree / "csrc/common/answer.cpp").write_text("int lost(); int f() { return lost(); }\n")
    with pytest.raises(native.BuildError, match=r"does not link: .*lost"):
        build(small_tree)


def test_no_compiler(small_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    build(small_tree, "auto")
    missing = "the C++ compiler CXX=/nonexistent does not run"
    assert recorded(small_tree)["cpu"] == {"built": False, "reason": missing}
    with pytest.raises(native.BuildError, match=re.escape(missing)):
        build(small_tree, "cpu")


def test_nothing_asked_for_builds_nothing(small_tree: Path) -> None:
    build(small_tree, "0")
    assert {module["built"] for module in recorded(small_tree).values()} == {False}
    assert not (small_tree / "build").exists()


def test_reasons_for_no_cuda_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.88'\n")
    nvcc.chmod(0o755)
    cuda_13 = locate.Torch(tmp_path, "2.15.0+cu132", "13.2")

    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert native.why_no_cuda(None, "torch is not installed") == "torch is not installed"
    without_cuda = locate.Torch(tmp_path, "2.15.0+cpu", None)
    assert native.why_no_cuda(without_cuda, "") == "torch 2.15.0+cpu has no CUDA"
    assert native.why_no_cuda(cuda_13, "").startswith("nvcc not found")

    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    cuda_12 = locate.Torch(tmp_path, "2.15.0+cu126", "12.6")
    expected = "nvcc is CUDA 13.0, torch 2.15.0+cu126 is CUDA 12.6"
    assert native.why_no_cuda(cuda_12, "") == expected
    assert native.why_no_cuda(cuda_13, "", tmp_path) == "there are no CUDA kernels in csrc/"
    assert native.why_no_cuda(cuda_13, "") is None


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (None, ["8.0", "9.0", "10.0", "12.0+PTX"]),
        ("9.0", ["9.0"]),
        ("8.0;9.0a+PTX", ["8.0", "9.0a+PTX"]),
        ("9.0, 10.0", ["9.0", "10.0"]),
    ],
)
def test_cuda_architectures(tmp_path: Path, wanted: str | None, expected: list[str]) -> None:
    nvcc = nvcc_that_knows(tmp_path, "80", "86", "90", "100", "120")
    environ = {} if wanted is None else {"TORCH_CUDA_ARCH_LIST": wanted}
    assert native.cuda_architectures(nvcc, environ) == expected


def test_an_older_nvcc_compiles_for_what_it_knows(tmp_path: Path) -> None:
    assert native.cuda_architectures(nvcc_that_knows(tmp_path, "80", "90"), {}) == ["8.0", "9.0+PTX"]
    with pytest.raises(native.BuildError, match="compiles for none of 8.0, 9.0"):
        native.cuda_architectures(nvcc_that_knows(tmp_path, "70"), {})


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ("Hopper", "'Hopper' is no compute capability"),
        ("7.5", "7.5: the kernels are for 8.0 and later"),
        ("13.0", "does not know 13.0"),
    ],
)
def test_bad_cuda_architectures(tmp_path: Path, wanted: str, words: str) -> None:
    nvcc = nvcc_that_knows(tmp_path, "75", "80", "90")
    with pytest.raises(native.BuildError, match=f"TORCH_CUDA_ARCH_LIST: .*{words}"):
        native.cuda_architectures(nvcc, {"TORCH_CUDA_ARCH_LIST": wanted})


def test_flags_of_an_architecture() -> None:
    assert native.gencode("9.0a") == ["-gencode", "arch=compute_90a,code=sm_90a"]
    assert native.gencode("12.0+PTX")[1::2] == [
        "arch=compute_120,code=sm_120",
        "arch=compute_120,code=compute_120",
    ]


def nvcc_that_knows(directory: Path, *numbers: str) -> Path:
    """An nvcc that lists these architectures."""
    nvcc = directory / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf 'compute_%s\\n' {' '.join(numbers)}\n")
    nvcc.chmod(0o755)
    return nvcc


def test_cuda_asked_for_is_an_error(small_tree: Path) -> None:
    with pytest.raises(native.BuildError, match="CUDA kernels not built: "):
        build(small_tree, "cuda")


def test_jobs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.setattr(native, "available_memory", lambda: 16 << 30)
    assert native.max_jobs() == 8  # 2 GiB for each
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native.max_jobs() == 3
    monkeypatch.setattr(native, "available_memory", lambda: 1 << 30)
    assert native.max_jobs() == 1
