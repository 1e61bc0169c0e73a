"""What each kind of small kernel costs a decode step of M1-3B: the step's time without it. On one GPU.

    python benchmarks/engine_ablation.py      # JSON into results/engine_ablation.json

A step is a chain of kernels that overlap at their ends, so times of single kernels don't add up to it. Here the step's graph is
captured with one kind of kernel left out, and replayed at a context of 256. What such a step computes is nonsense; that it
takes less time says how much there is to gain, at most, by making that kind faster or part of another.
"""

import argparse
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from engine import Case, decode_seconds, make_engine
from engine_models import random_model

from m1.engine.fp8 import Fp8Linear, QuantizedRows
from m1.kernels.fp8 import FP8
from m1.modeling import M1ForCausalLM
from m1.storage import git_revision, write_json

CONTEXT = 256
KINDS = ["norms", "mixers' steps", "step sizes", "attention"]
FP8_KINDS = ["quantization", "SwiGLU"]  # launches of their own with 8-bit weights alone


class Without:
    """A model whose modules do without some kinds of kernels, until `undo`. Graphs are made anew between the two."""

    def __init__(self, model: M1ForCausalLM, kinds: list[str], num_rows: int, is_fp8: bool) -> None:
        self._changed: list[tuple[Any, str]] = []
        self._num_rows, self._is_fp8 = num_rows, is_fp8
        config = model.config
        if "norms" in kinds:
            norm = self._norm(config.hidden_size)
            for block in model.model.layers:
                self._put(block.input_layernorm, "forward", norm)
                self._put(block.post_attention_layernorm, "forward", norm)
            if not is_fp8:
                self._put(model.model.norm, "forward", norm)
        for block in model.model.layers:
            mixer = block.token_mixer
            if block.is_mixer and "mixers' steps" in kinds:
                self._put(mixer, "_step", lambda z, *others: z)
            if block.is_mixer and "step sizes" in kinds:
                zeros = torch.zeros(num_rows, config.d_inner, device="cuda", dtype=torch.bfloat16)
                self._put(mixer.dt_proj, "forward", lambda x, zeros=zeros: zeros)
            if not block.is_mixer and "attention" in kinds:
                self._put(mixer, "_attend_cached", lambda q, *others: q)
            if "quantization" in kinds:
                linear = mixer.out_proj if block.is_mixer else mixer.o_proj
                rows = self._rows(config.d_inner)
                self._put(linear, "forward", lambda x, linear=linear, rows=rows: Fp8Linear.forward(linear, rows))
            if "SwiGLU" in kinds:
                self._put(block.mlp, "forward", self._mlp(block.mlp, config.intermediate_size))

    def undo(self) -> None:
        for module, name in self._changed:
            module.__dict__.pop(name)

    def _put(self, module: Any, name: str, function: Callable[..., Any]) -> None:
        self._changed.append((module, name))
        object.__setattr__(module, name, function)

    def _rows(self, width: int) -> QuantizedRows:
        values = torch.ones(self._num_rows, width, device="cuda").to(FP8)
        return QuantizedRows(values, torch.full((self._num_rows, 1), 1e-3, device="cuda"))

    def _norm(self, width: int) -> Callable[..., Any]:
        rows = self._rows(width) if self._is_fp8 else torch.ones(self._num_rows, width, device="cuda", dtype=torch.bfloat16)

        def forward(x: Any, residual: Any = None) -> Any:
            return rows if residual is None else (rows, residual)

        return forward

    def _mlp(self, mlp: Any, width: int) -> Callable[..., Any]:
        rows = self._rows(width)

        def forward(x: Any) -> Any:
            mlp.gate_up_proj(x)
            return mlp.down_proj(rows)

        return forward


def measure(model: M1ForCausalLM, num_rows: int, is_fp8: bool, arguments: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of a step, by what it does without."""
    case = Case.parse(f"m1-3b{'+fp8' if is_fp8 else ''}/{num_rows}/512@steps")
    engine = make_engine(model, case, arguments)
    assert engine.runner.state is not None
    for stack in (*engine.runner.state.slot_stacks, *engine.runner.state.page_stacks):
        for layer in stack:
            _ = layer.random_(0, 56) if layer.dtype == torch.uint8 else layer.normal_(0, 0.5)
    kinds = [*KINDS, *(FP8_KINDS if is_fp8 else [])]
    found = {}
    together = [[*FP8_KINDS, "norms"]] if is_fp8 else []
    for left_out in ([], *([kind] for kind in kinds), *together, kinds):
        without = Without(model, left_out, num_rows, is_fp8)
        engine.runner._graphs = None
        seconds = min(decode_seconds(engine, num_rows, CONTEXT) or 0.0 for _ in range(2))
        without.undo()
        found[", ".join(left_out) or "nothing"] = 1000 * seconds
        print(f"{case.text} without {', '.join(left_out) or 'nothing'}: {1000 * seconds:.3f} ms", flush=True)
    engine.sleep()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--out", default="results/engine_ablation.json")
    parser.add_argument("--revision", default="", help="if this directory is no git repository")
    arguments = parser.parse_args()
    options = argparse.Namespace(budget=8192, eager=False, ahead=None)
    steps: dict[str, dict[str, float]] = {}
    record = {
        "command": " ".join(["python", *sys.argv]),
        "revision": arguments.revision or git_revision(),
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "milliseconds_without": steps,
    }
    for is_fp8 in (False, True):
        model = random_model("m1-3b", "mamba1", is_fp8)
        for num_rows in arguments.sequences:
            steps[f"{'fp8' if is_fp8 else 'bf16'}, {num_rows}"] = measure(model, num_rows, is_fp8, options)
            write_json(Path(arguments.out), record)  # what was measured outlives an interrupt
        del model
        torch.cuda.empty_cache()
    print(f"written to {arguments.out}")


if __name__ == "__main__":
    main()
