"""The library that nvcc makes: every kernel as promised, and loadable without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from build_tools import locate, native
from tests.cuda import compiled

# One worker builds; the others do something else meanwhile.
pytestmark = pytest.mark.xdist_group("nvcc")


def test_every_kernel_is_as_promised():
    found = compiled.kernels(compiled.library())
    capabilities = {kernel.capability for kernel in found}
    assert capabilities == {90} if compiled.recorded() else capabilities > set(compiled.CHECKED)
    wrong = compiled.broken(found)
    assert not wrong, "\n".join(wrong)


def test_the_record_is_of_these_kernels(monkeypatch, tmp_path):
    """A changed kernel is compiled for all architectures."""
    changed = tmp_path / "csrc" / "silu"
    changed.mkdir(parents=True)
    before = compiled.digest()
    monkeypatch.setattr(native, "ROOT", tmp_path)
    (changed / "cuda.cu").write_text("// another kernel")
    assert compiled.digest() != before and not compiled.recorded()


def test_every_promise_is_of_a_kernel():
    names = {kernel.name for kernel in compiled.kernels(compiled.library())}
    for promise in compiled.promises():
        assert any(re.fullmatch(promise.name, name) for name in names), promise.name


def test_loads_without_a_gpu():
    code = f"""
import torch
torch.ops.load_library({str(compiled.library())!r})
ops = torch.ops.effkernels_cuda
print(hasattr(ops, "activation"))
try:
    ops.activation(torch.empty(3), torch.empty(3), None, 3)
except NotImplementedError:
    print("no CPU kernel")
"""
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, capture_output=True, text=True, env={"CUDA_VISIBLE_DEVICES": ""})
    assert run.stdout.split("\n")[:2] == ["True", "no CPU kernel"], run.stderr


def test_needs_the_runtime_that_torch_has_loaded():
    """By name alone, wherever it is; the driver is looked for when a kernel runs."""
    command = ["readelf", "-d", compiled.library()]
    dynamic = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert any(name.startswith("libcudart.so.") for name in needed)
    assert not any(name.startswith("libcuda.so") for name in needed)
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


BROKEN = """
#include "common/cuda.h"
namespace effkernels {
__global__ void __launch_bounds__(256) spills(float* x, int n) {
  float values[64] = {};
  for (int i = 0; i < n; i++) values[i * n % 64] += x[i * 256 + threadIdx.x];
  x[threadIdx.x] = values[n % 64];
}
__global__ void __launch_bounds__(256) narrow(uint32_t* to, const uint32_t* from) {
  to[threadIdx.x] = from[threadIdx.x];
}
__global__ void __launch_bounds__(256) fat(float* x) {
  float values[120];
#pragma unroll
  for (int i = 0; i < 120; i++) values[i] = x[i * 256 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 120; i++) x[(119 - i) * 256 + threadIdx.x] = values[i] * values[0];
}
}
"""


@pytest.mark.parametrize(
    ("promise", "words"),
    [
        ("spills threads 256, shared 0, warps 8", "local memory"),
        ("narrow threads 256, shared 0, warps 8, loads 16", "no load of 16 bytes"),
        ("narrow threads 256, shared 0, warps 8, stores 16", "no store of 16 bytes"),
        ("narrow threads 256, shared 0, warps 8, tensor cores", "no tensor-core"),
        ("narrow threads 256, shared 120000, warps 16", "8 warps fit, 16 promised"),
        ("fat threads 256, shared 0, warps 32", "warps fit, 32 promised"),
    ],
)
def test_broken_promises_are_found(tmp_path_factory, promise, words):
    fatbin = _broken(tmp_path_factory.getbasetemp())
    (promised,) = compiled.read_promises(f"// promise: {promise}")
    (kernel,) = [k for k in compiled.kernels(fatbin) if k.name == promised.name]
    wrong = kernel.wrong(promised)
    assert len(wrong) == 1 and words in wrong[0], wrong


def _broken(directory: Path) -> Path:
    fatbin = directory / "broken.fatbin"
    if not fatbin.exists():
        nvcc = locate.find_nvcc()
        if nvcc is None:
            pytest.skip("nvcc is not here")
        source = directory / "broken.cu"
        source.write_text(BROKEN)
        subprocess.run(
            [nvcc, native.KERNEL_STANDARD, "-fatbin", "-arch=sm_90", f"-I{native.ROOT / 'csrc'}"]
            + [source, "-o", fatbin],
            check=True,
        )
    return fatbin


def test_torch_without_cuda_builds_none(tmp_path):
    reason = native.why_no_cuda(locate.Torch(tmp_path, "2.15.0+cpu", None), "")
    assert reason == "torch 2.15.0+cpu has no CUDA"
    assert torch.version.cuda is None or native.why_no_cuda(locate.find_torch()[0], "") != reason
