"""The machine code of the kernels, compiled without a GPU: does every launch compile, and what does a change do to it?

    python benchmarks/kernel_code.py --only "mamba1_step 3B"                 # registers, spills, shared memory, instructions
    python benchmarks/kernel_code.py --out before.json                       # every launch of every case of kernels.py
    python benchmarks/kernel_code.py --out after.json --compare before.json  # and which came out otherwise

Takes the cases of kernels.py, whose tensors are here without memory (torch's fake tensors), notes what each launches instead of
launching it, and has Triton compile that for an H100 (or --arch). Launch sizes are chosen as on one. Equal code of all launches
is as good as a test on a GPU for a change that should not change it; other code has to be run.
"""

import argparse
import contextlib
import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import torch
import triton
import triton.language as tl
from kernel_workers import chosen_cases
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from m1.kernels import dispatch, launch

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e4m3fn: "fp8e4nv", torch.uint8: "u8",
    torch.int16: "i16", torch.int32: "i32", torch.int64: "i64", torch.bool: "i1",
}  # fmt: skip
H100 = SimpleNamespace(multi_processor_count=132, shared_memory_per_multiprocessor=228 * 2**10)
OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "launch_pdl")


@dataclass
class Launch:
    """A kernel with the types of its arguments, those that are compiled in, which are multiples of 16, and options."""

    case: str
    kernel: JITFunction[Any]
    types: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: list[int] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def add(self, place: int, name: str, value: Any) -> None:
        parameter = self.kernel.params[place]
        if parameter.is_constexpr or value is None or isinstance(value, (str, tl.dtype)):
            self.types[name], self.constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            self.types[name] = f"*{TYPES[value.dtype]}"
            self.aligned.append(place)  # of what torch allocates; slices of a row are multiples of 16 bytes here
        elif hasattr(value, "block_shape"):  # a tensor descriptor
            self.types[name] = f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, int) and not isinstance(value, bool):
            if value == 1 and not parameter.do_not_specialize:
                self.types[name], self.constants[name] = "constexpr", 1
                return
            self.types[name] = "i32" if abs(value) < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                self.aligned.append(place)
        else:
            self.types[name] = {bool: "i1", float: "fp32"}[type(value)]

    @property
    def key(self) -> str:
        """Equal for launches that Triton would compile once."""
        return repr(
            (self.kernel.__name__, self.types, {n: str(v) for n, v in self.constants.items()}, self.aligned, self.options)
        )


@contextlib.contextmanager
def noted(launches: list[Launch], case: Callable[[], str]) -> Iterator[None]:
    """Within, kernels serve any tensor as an H100 would be served, and are noted instead of launched. For a process of its own:
    what ops keep for later calls is kept of fake tensors then."""

    def note(kernel: JITFunction[Any], *values: Any, grid: Any, warmup: bool, **named: Any) -> None:
        found = Launch(case(), kernel)
        given = dict(zip(kernel.arg_names, values, strict=False)) | named
        for place, name in enumerate(kernel.arg_names):
            found.add(place, name, given.get(name, kernel.params[place].default))
        found.options = {name: named[name] for name in OPTIONS if named.get(name) is not None}
        if found.key not in {known.key for known in launches}:
            launches.append(found)

    with contextlib.ExitStack() as patches:
        for place, name, stand_in in (
            (JITFunction, "run", note),
            (dispatch, "use_triton", lambda tensor: True),
            (launch, "_can_chain", lambda device: True),
            (torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
            (torch.cuda, "get_device_properties", lambda device=None: H100),
            (torch.cuda, "is_current_stream_capturing", lambda: True),  # nothing is kept for a later call
            (torch.cuda, "current_stream", lambda device=None: SimpleNamespace(cuda_stream=0)),
        ):
            patches.enter_context(mock.patch.object(place, name, stand_in))
        yield


class _AsOnAGpu(TorchFunctionMode):
    """Tensors that are asked for on a GPU are made on the CPU, for fake ones of a GPU know no gradients where there is none;
    they say that they are on one, so that ops don't look at their values."""

    _answers: ClassVar[dict[Any, Any]] = {
        getattr(torch.Tensor, "is_cuda").__get__: True,  # noqa: B009 (mypy takes it for a bool)
        torch.Tensor.device.__get__: torch.device("cuda", 0),
    }

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function in self._answers and isinstance(args[0], FakeTensor):
            return self._answers[function]
        if function is torch.Tensor.cuda:
            return args[0]
        if torch.device(kwargs.get("device") or "cpu").type == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def launches_of(patterns: list[str]) -> list[Launch]:
    """What the cases launch whose names contain one of `patterns` (all without any), forwards and backwards."""
    launches: list[Launch] = []
    name = ""
    cases = chosen_cases(patterns)
    with noted(launches, lambda: name), _AsOnAGpu(), FakeTensorMode(allow_non_fake_inputs=True):
        for case in cases:
            name = case.name
            case.build()[0]()
    return launches


def code_of(found: Launch, arch: int) -> dict[str, Any]:
    """Compile, and read what the machine code needs. bytes of shared memory and of spills are for each program, thread."""
    attributes = {(place,): [["tt.divisibility", 16]] for place in found.aligned}
    source = ASTSource(found.kernel, found.types, constexprs=found.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=found.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    code = [line for line in listing.splitlines() if re.match(r"\s*/\*[0-9a-f]{4,}\*/", line)]
    needs = dict(re.findall(r"(REG|STACK):(\d+)", usage.stdout + usage.stderr))
    return {
        "registers": int(needs["REG"]),
        "spills": int(needs["STACK"]),
        "shared": compiled.metadata.shared,
        "instructions": len(code),
        "code": hashlib.sha256("\n".join(code).encode()).hexdigest()[:16],
    }


def describe(task: tuple[list[str], int, int, int]) -> list[dict[str, Any]]:
    """Every `of`-th launch, from number `first` on; in a process that finds them itself, for kernels don't travel."""
    patterns, arch, first, of = task
    rows = []
    for found in launches_of(patterns)[first::of]:
        identity = hashlib.sha256(found.key.encode()).hexdigest()[:8]
        row = {"case": found.case, "kernel": found.kernel.__name__, "launch": identity}
        try:
            row |= code_of(found, arch)
        except Exception as error:  # whatever a compiler raises is what is to be told
            row["error"] = f"{type(error).__name__}: {error}"[:2000]
        rows.append(row)
    return rows


def compare(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[str]:
    """A line for each launch whose code is another now, or which is there on one side alone."""
    sides = [{(row["kernel"], row["launch"]): row for row in rows} for rows in (before, after)]  # cases share launches
    lines = []
    for key in sorted(sides[0].keys() | sides[1].keys()):
        old, new = (side.get(key) for side in sides)
        if old is None or new is None:
            lines.append(f"{'new' if old is None else 'gone':8} {key[0]}  ({(old or new or {})['case']})")
        elif old.get("code") != new.get("code"):
            changes = [
                f"{name} {old.get(name)} -> {new.get(name)}" for name in ("registers", "spills", "shared", "instructions")
            ]
            lines.append(f"{'changed':8} {key[0]}: {', '.join(changes)}  ({new['case']})")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="cases whose name contains it; repeatable")
    parser.add_argument("--arch", type=int, default=90, help="compute capability, times ten")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="an earlier --out")
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs) as pool:
        parts = pool.map(describe, [(options.only, options.arch, part, options.jobs) for part in range(options.jobs)])
        rows = sorted((row for part in parts for row in part), key=lambda row: (row["case"], row["kernel"], row["launch"]))
    print("registers and bytes of spills a thread, bytes of shared memory, instructions")
    for row in rows:
        numbers = "{registers:5}{spills:8}{shared:9}{instructions:8}".format_map(row) if "code" in row else f"{'FAILED':>30}"
        print(f"{numbers}  {row['kernel']:28} {row['case']}")
    print(f"{len(rows)} launches, Triton {triton.__version__}")
    if options.out:
        options.out.write_text(
            json.dumps({"triton": triton.__version__, "arch": options.arch, "launches": rows}, indent=1) + "\n"
        )
    if options.compare:
        before = json.loads(options.compare.read_text())
        print("\n".join(compare(before["launches"], rows)) or "the machine code of all of them is the same")
    failed = [row for row in rows if "error" in row]
    for row in failed:
        print(f"{row['kernel']} of {row['case']}: {row['error']}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
