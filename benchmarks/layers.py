"""What a mixer costs in training beside the attention layer that it replaces: forward and backward, projections included.

    PYTHONPATH=src python benchmarks/layers.py                       # the table; JSON into results/layers.json
    PYTHONPATH=src python benchmarks/layers.py --sizes 3b --profile  # and which kernels take the time

16,384 packed tokens in documents of 4,096 or as one; bf16; weights random; gradients of the input and of every weight.
Each line is the median of timed forward and backward passes after a warm-up, as Python launches them and, replayed as one
CUDA graph, what they take of the GPU alone: small layers are over before the next launch. `over attention` is the ratio of
times, whose goal is 1.35 at a length of 4,096 and below 1 at 16,384.
"""

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kernel_timing import seconds_of, time_calls
from torch import nn

from m1.modeling import M1Config
from m1.modeling.attention import Attention
from m1.modeling.mamba1 import Mamba1Mixer
from m1.modeling.mamba2 import Mamba2Mixer
from m1.modeling.rotary import RotaryEmbedding
from m1.modeling.state import SequenceLayout
from m1.storage import git_revision, write_json

TOKENS = 16384
SIZES: dict[str, dict[str, int]] = {  # Llama-3.2-3B, Qwen2.5-0.5B, SmolLM2-135M
    "3b": {"hidden_size": 3072, "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128},
    "0.5b": {"hidden_size": 896, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 64},
    "135m": {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64},
}
LAYERS: dict[str, Callable[[M1Config, int], nn.Module]] = {
    "attention": Attention,
    "mamba1": Mamba1Mixer,
    "mamba2": Mamba2Mixer,
}


def make_pass(kind: str, size: str, length: int) -> Callable[[], Any]:
    """A call that runs one layer forwards and backwards over TOKENS tokens in documents of `length`."""
    torch.manual_seed(0)
    mixer = "mamba1" if kind == "attention" else kind
    types = ["full_attention" if kind == "attention" else "linear_attention"]
    config = M1Config(**SIZES[size], num_hidden_layers=1, layer_types=types, mixer=mixer, vocab_size=256)
    layer = LAYERS[kind](config, 0).to("cuda", torch.bfloat16)
    layout = SequenceLayout.from_lengths([length] * (TOKENS // length), "cuda")
    rotary = RotaryEmbedding(config)(layout.positions)
    x = torch.randn(TOKENS, config.hidden_size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn_like(x)
    wanted = [x, *layer.parameters()]

    def run() -> Any:
        return torch.autograd.grad(layer(x, layout, rotary), wanted, upstream)

    return run


def time_pass(run: Callable[[], Any], repeats: int) -> float:
    """Median seconds, after three passes of warming up."""
    return statistics.median([seconds_of(run) for _ in range(3 + repeats)][3:])


def compare(timed: list[tuple[dict[str, Any], Callable[[], Any]]], kind: str, ratio: str) -> None:
    """Set the last row's ratio to the attention layer of its size and length, and print it."""
    row = timed[-1][0]
    attention = next(r for r, _ in timed if (r["size"], r["length"], r["layer"]) == (row["size"], row["length"], "attention"))
    row[ratio] = row[kind] / attention[kind]
    label = f"{row['size']:5} {row['layer']:10} {row['length']:6,} long"
    print(f"{label} {row[kind] * 1e3:8.3f}  {row[ratio]:6.2f}  {kind}", flush=True)


def kernels_of(run: Callable[[], Any], most: int = 12) -> dict[str, float]:
    """Milliseconds by kernel of one pass, the longest first."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    times: Counter[str] = Counter()
    for event in profile.events():
        times[event.name[:80]] += event.device_time_total / 1000
    return dict(times.most_common(most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--lengths", nargs="+", type=int, default=[4096, 16384])
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--start-when", type=Path, metavar="FILE", help="compile, but time nothing before it exists")
    parser.add_argument("--revision", default="", help="if this directory is no git repository")
    parser.add_argument("--out", type=Path, default=Path("results/layers.json"))
    options = parser.parse_args()
    record = {
        "command": "python benchmarks/layers.py",
        "hardware": {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__},
        "revision": options.revision or git_revision(),
        "tokens": TOKENS,
    }

    def keep() -> None:
        write_json(options.out, record | {"rows": [row for row, _ in timed]})  # after each: a cut-off loses the rest alone

    chosen = list(itertools.product(options.sizes, options.lengths, LAYERS))
    passes = [make_pass(kind, size, length) for size, length, kind in chosen]
    for run in passes:
        run()
    print("compiled", flush=True)
    while options.start_when is not None and not options.start_when.exists():
        time.sleep(0.1)
    print(f"{'':28}      ms  over attention")
    timed: list[tuple[dict[str, Any], Callable[[], Any]]] = []
    for (size, length, kind), run in zip(chosen, passes, strict=True):
        row: dict[str, Any] = {"size": size, "length": length, "layer": kind, "seconds": time_pass(run, options.repeats)}
        timed.append((row, run))
        compare(timed, "seconds", "over_attention")
        if options.profile:
            row["kernels_ms"] = kernels_of(run)
            print("\n".join(f"    {ms:8.3f}  {name}" for name, ms in row["kernels_ms"].items()))
        keep()
    for count, (row, run) in enumerate(timed, 1):  # at last, for a process whose capture has failed can time nothing more
        row["graph_seconds"] = time_calls([run])
        compare(timed[:count], "graph_seconds", "graph_over_attention")
        keep()


if __name__ == "__main__":
    main()
