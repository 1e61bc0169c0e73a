"""Kernels compile for a GPU that is not there (the interpreter takes code that the compiler refuses), and changes are told."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CASES = (
    "selective_scan backward 135M", "ssd_scan backward 135M", "causal_conv1d backward 135M", "mamba1_step 135M",
    "mamba2_step 135M", "decode attention 135M bfloat16", "prefill attention 0.5B", "rms_norm + residual backward 3B 512",
    "rms_norm_fp8", "swiglu 3B 512", "rope_write_kv", "state heads backward 3B 512", "fp8_linear gate_up 3B 32",
)  # fmt: skip


def kernel_code(*options: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, where Triton does not interpret."""
    command = [sys.executable, ROOT / "benchmarks" / "kernel_code.py", *options]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT / "src"), "PYTHONWARNINGS": "ignore"}
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("code") / "code.json"
    run = kernel_code("--jobs", 1, "--out", out, *(word for case in CASES for word in ("--only", case)))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return out


def test_kernels_compile_without_a_gpu(compiled):
    launches = json.loads(compiled.read_text())["launches"]
    assert len({row["kernel"] for row in launches}) > 25
    for row in launches:
        assert row["instructions"] > 50 and 16 <= row["registers"] <= 255, row
        assert row["shared"] <= 227 * 2**10, f"more shared memory than an H100's program can have: {row}"


def test_changed_code_is_told(compiled, tmp_path):
    known = json.loads(compiled.read_text())
    [row] = [row for row in known["launches"] if row["kernel"] == "_forward_kernel"]
    row["code"], row["registers"] = "another", 200
    (tmp_path / "before.json").write_text(json.dumps(known))
    run = kernel_code("--jobs", 1, "--only", "swiglu 3B 512", "--compare", tmp_path / "before.json")
    changed = [line for line in run.stdout.splitlines() if line.startswith("changed")]
    assert len(changed) == 1 and "_forward_kernel: registers 200 -> " in changed[0]
    again = kernel_code("--jobs", 1, "--only", "swiglu 3B 512", "--compare", compiled)
    assert not [line for line in again.stdout.splitlines() if line.startswith(("changed", "new"))]
