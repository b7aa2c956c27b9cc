"""Fused Triton kernels: the cases, on a GPU or in Triton's interpreter, and the choice of them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pyro_flipout import FlipoutWarning, kernels

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def needs_cuda(test):
    skip = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.cuda(skip(test))


def run_cases(tmp_path, *which, **variables):
    """Runs ``cases.py``, or ``which``, in a process with these environment variables."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTEST_", "TRITON_"))
    }
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *(which or ["tests/kernels/cases.py"])],
        cwd=ROOT,
        env=inherited | {"TRITON_CACHE_DIR": str(tmp_path)} | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return int(re.search(r"(\d+) passed", done.stdout)[1])


@needs_triton
def test_in_the_interpreter(tmp_path):
    assert run_cases(tmp_path, TRITON_INTERPRET="1", PYRO_FLIPOUT_TRITON="1") > 130


@needs_triton
@needs_cuda
def test_on_a_gpu(tmp_path):
    assert run_cases(tmp_path, PYRO_FLIPOUT_TRITON="1") > 130


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pyro_flipout.kernels import _triton

names = ["HAS_IN", "HAS_OUT", "HAS_BIAS", "HAS_BIAS_DELTA", "CENTER", "DELTA"]
names += ["HAS_X", "ADD"]
flags = dict.fromkeys(names, True)
constants = {
    **flags, "UPCAST": False, "BITS": 32, "PRECISION": "ieee", "ACC": _triton.tl.float32,
    **dict.fromkeys(["BM", "BO", "BK", "BC"], 32), "GROUP": 8, "ALONG_ROWS": False,
    **dict.fromkeys(["x_k", "c_k", "d_k", "g_o"], 1),
}
data = ["x", "center", "delta", "bias", "bias_delta", "out", "grad"]
data += ["grad_center", "grad_delta", "grad_bias", "grad_bias_delta"]
codes = dict.fromkeys(["in_codes", "out_codes", "bias_codes", "codes"], "*i32")
for kernel, dtype, capability, *more in (
    (_triton.product.fn, "bf16", 80),
    (_triton.product.fn, "fp32", 90),
    (_triton.weight_grads.fn, "fp32", 80),
    (_triton.weight_grads.fn, "fp16", 90),
    (_triton.bias_grads, "bf16", 90),
    (_triton.flips, "bf16", 80),
    (_triton.flips, "fp32", 90, {"ALONG_ROWS": True}),
):
    pointers = dict.fromkeys(data, "*" + dtype) | codes
    names = kernel.arg_names
    values = constants | dict(*more)
    signature = {n: "constexpr" if n in values else pointers.get(n, "i32") for n in names}
    source = ASTSource(kernel, signature, {n: values[n] for n in names if n in values})
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": 4})
    print("mma" in compiled.asm["ptx"])
"""


@needs_triton
def test_compiles_for_gpus(tmp_path):
    """Triton's compiler takes what its interpreter takes; 16-bit products use tensor cores."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        cwd=ROOT,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False", "False", "True", *["False"] * 3]


# ------------------------------------------------------------------- the choice

ARGUMENTS = (torch.ones(4, 3), torch.ones(2, 3), torch.ones(2, 3))


def test_library_calls_on_the_cpu(monkeypatch):
    for mode in ("0", "1", "auto"):
        monkeypatch.setenv("PYRO_FLIPOUT_TRITON", mode)
        assert not kernels.available(*ARGUMENTS)


def test_unknown_mode(monkeypatch):
    monkeypatch.setattr(kernels, "_INTERPRETER", True)
    monkeypatch.setenv("PYRO_FLIPOUT_TRITON", "yes")
    with pytest.raises(ValueError, match="'yes', expected 0, 1 or auto"):
        kernels.available(*ARGUMENTS)


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    kernels._installed.cache_clear()
    monkeypatch.setattr(kernels, "_INTERPRETER", True)
    monkeypatch.setenv("PYRO_FLIPOUT_TRITON", "1")
    try:
        assert not kernels.available(*ARGUMENTS)
    finally:
        kernels._installed.cache_clear()


@needs_cuda
def test_forced_without_triton(monkeypatch):
    monkeypatch.setattr(kernels, "_installed", lambda: False)
    monkeypatch.setenv("PYRO_FLIPOUT_TRITON", "1")
    with pytest.raises(ImportError, match="Triton is not installed"):
        kernels.available(*(t.cuda() for t in ARGUMENTS))


@pytest.fixture
def broken(monkeypatch):
    """Triton is there and cannot compile, as in a container without a C compiler."""

    def fail(device):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(kernels, "_try_kernel", fail)
    monkeypatch.setattr(kernels, "_installed", lambda: True)
    kernels._failure.cache_clear()
    yield SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    kernels._failure.cache_clear()


def test_broken_triton_is_told_once(broken):
    with pytest.warns(FlipoutWarning, match="cuda:0 .*find C compiler.*library calls.*TRITON=0"):
        assert not kernels._can(broken, "auto")
    assert not kernels._can(broken, "auto")


def test_forced_on_broken_triton(broken):
    with pytest.warns(FlipoutWarning), pytest.raises(RuntimeError, match="is 1, but Triton cannot"):
        kernels._can(broken, "1")


PRECISIONS = """
import torch
from pyro_flipout.kernels import allows_tf32

matmul = torch.backends.cuda.matmul
found = [allows_tf32()]
for legacy in (True, False):
    matmul.allow_tf32 = legacy
    found.append(allows_tf32())
for precision in ("high", "highest"):
    torch.set_float32_matmul_precision(precision)
    found.append(allows_tf32())
for precision in ("tf32", "ieee") if hasattr(matmul, "fp32_precision") else ():
    matmul.fp32_precision = precision
    found.append(allows_tf32())
print(*found)
"""


def test_tf32_is_the_users_choice():
    """Set by its old names and its new one, in a process of its own."""
    command = [sys.executable, "-c", PRECISIONS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expected = ["False", *["True", "False"] * 3]
    assert done.stdout.split() in (expected, expected[:-2]), done.stderr


def test_auto_prefers_library_calls_for_wide_layers(monkeypatch):
    for dtype, tf32, width in ((torch.bfloat16, False, 512), (torch.float32, True, 256)):
        monkeypatch.setattr(kernels, "allows_tf32", lambda tf32=tf32: tf32)
        assert kernels._pays(dtype, width, width)
        assert not kernels._pays(dtype, width + 1, width + 1)
        assert kernels._pays(dtype, 4096, width // 2)


def test_auto_prefers_library_calls_in_full_float32(monkeypatch):
    monkeypatch.setattr(kernels, "allows_tf32", lambda: False)
    assert not kernels._pays(torch.float32, 8, 8)


@pytest.mark.slow  # five minutes of interpreter
@needs_triton
def test_every_rule_in_the_interpreter(tmp_path):
    """All rules with signs and dense products by kernels, in groups too."""
    command = ["tests/rules/test_oracle.py", "-k", "not explicit", "-n", "2"]
    variables = {"TRITON_INTERPRET": "1", "PYRO_FLIPOUT_TRITON": "1"}
    assert run_cases(tmp_path, *command, **variables) > 2000
