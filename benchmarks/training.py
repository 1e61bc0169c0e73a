"""Training throughput: tokens a second, share of the matrix-product limit, and peak memory of each stage.

    python benchmarks/training.py                                 # table; JSON into results/training.json
    python benchmarks/training.py --reduced                       # distillation alone, about a minute
    python benchmarks/training.py --sizes 3b --stages distill     # some of the cases
    python benchmarks/training.py --data gym:leg_counting         # other text, as m1 distill takes it
    python benchmarks/training.py --data random                   # random tokens, longer documents
    torchrun --nproc-per-node 4 benchmarks/training.py --replicate always never    # 4 GPUs: the model whole on each, divided

Models have the dimensions of SmolLM2-135M, Qwen2.5-0.5B and Llama-3.2-3B with random weights, every fourth layer attention.
Documents are packed and have at most 2,048 tokens; what text they are by default is in training_text.py.
What is timed are steps of the training loop itself, packing, optimizer and metrics included, after the first two.

The share is of 790 TFLOP/s, which large bf16 products reach on an H100: products of linear layers, of the head and of attention
scores are counted as they are done (forward, gradients of inputs, gradients of the weights that train); scans, convolutions and
everything elementwise count nothing. --profile adds which kernels take the time of a step.
"""

import argparse
import itertools
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from training_text import documents_of

from m1.config import AlignConfig, DistillConfig, SFTConfig
from m1.distributed import is_first, num_ranks, ranks, say
from m1.modeling import M1Config, M1ForCausalLM
from m1.storage import git_revision, write_json
from m1.training.align import align
from m1.training.distill import distill
from m1.training.optimizer import group_of
from m1.training.packing import Document
from m1.training.sft import sft
from m1.training.sharding import is_divided

MATRIX_LIMIT = 790e12  # FLOP/s
ATTENTION_EVERY, MAX_LENGTH, WARMUP_STEPS = 4, 2048, 2
SIZES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
    "0.5b": {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "attention_bias": True,
        "mixer_bias": True,
    },
    "3b": {
        "vocab_size": 128256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
# Packed tokens of one forward and backward, and whether activations are recomputed, on a GPU of 80 GB.
BATCHES = {"135m": (65536, False), "0.5b": (32768, False), "3b": (8192, True)}


@dataclass(frozen=True)
class Result:
    size: str
    mixer: str
    stage: str
    num_ranks: int
    tokens_per_batch: int
    batches: int  # a step and rank
    gradient_checkpointing: bool
    is_divided: bool  # among the ranks
    reshard_after_forward: bool
    documents: dict[str, float]  # mean and greatest length, and the share of tokens that are targets
    tokens_per_second: float
    seconds_per_step: float
    matrix_limit_share: float
    peak_memory_gib: float
    kernel_seconds: dict[str, float] = field(default_factory=dict)  # GPU time of a step: in all, and by kernel, the largest


def make_model(size: str, mixer: str, device: torch.device, *, dense: bool = False) -> M1ForCausalLM:
    """Random weights on the device: fp32 for a student, bf16 for a (dense) teacher."""
    layers = SIZES[size]["num_hidden_layers"]
    kinds = [
        "full_attention" if dense or i % ATTENTION_EVERY == ATTENTION_EVERY - 1 else "linear_attention" for i in range(layers)
    ]
    torch.manual_seed(0)
    with torch.device(device):
        model = M1ForCausalLM(M1Config(layer_types=kinds, mixer=mixer, tie_word_embeddings=True, **SIZES[size]))
    return model.to(torch.bfloat16).requires_grad_(False).eval() if dense else model


def describe(documents: Sequence[Document]) -> dict[str, float]:
    lengths = [len(document.token_ids) for document in documents]
    targets = sum(document.num_targets for document in documents) / sum(lengths)
    return {"mean_length": round(statistics.mean(lengths), 1), "max_length": max(lengths), "targets": round(targets, 4)}


def all_reduce_rate(device: torch.device) -> float:
    """Bytes a second that each GPU sends while 256 MiB are summed over n ranks: 2 (n - 1) / n times the bytes, as in a ring."""
    tensor, seconds = torch.ones(2**26, device=device), []
    for _ in range(8):
        dist.barrier(device_ids=[device.index])
        began = time.perf_counter()
        dist.all_reduce(tensor)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return 2 * (num_ranks() - 1) / num_ranks() * tensor.nbytes / statistics.median(seconds[2:])


def count_flops(model: M1ForCausalLM, documents: Sequence[Document], *, trains: bool, needs_head: bool) -> float:
    """Of matrix products for one token of the documents on average: linear layers, head on targets, attention scores."""
    lengths = np.array([len(document.token_ids) for document in documents], dtype=np.float64)
    targets = sum(document.num_targets for document in documents) / lengths.sum()
    config = model.config
    flops = 0.0
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        rows = targets if name == "lm_head" else 1.0
        if name == "lm_head" and not needs_head:
            continue
        products = 1 + (1 + module.weight.requires_grad if trains else 0)
        flops += 2 * module.weight.numel() * products * rows
    pairs = (lengths**2).sum() / 2 / lengths.sum()  # (query, key) a query, causal
    scores = 4 * config.d_inner * pairs * len(config.attention_layers)
    return flops + scores * (3.5 if trains else 1)  # the backward pass of attention makes its scores again: 2.5 forwards


def count_align_flops(student: M1ForCausalLM, teacher: M1ForCausalLM, documents: Sequence[Document]) -> float:
    """A forward of the teacher, and forward and gradients of the mixers' matrices (none of their inputs)."""
    mixers = sum(
        p.numel() for name, p in student.named_parameters() if group_of(name) == "mixers" and name.endswith("proj.weight")
    )
    outputs = sum(p.numel() for name, p in student.named_parameters() if name.endswith("out_proj.weight"))
    return count_flops(teacher, documents, trains=False, needs_head=False) + 2 * (2 * mixers + outputs)


def measure(
    size: str, mixer: str, stage: str, batches: int, replicate: str, device: torch.device, options: argparse.Namespace
) -> Result:
    per_batch, recomputes = BATCHES[size]
    per_batch = options.tokens_per_batch or per_batch
    common: dict[str, Any] = {
        "steps": WARMUP_STEPS + options.steps,
        "tokens_per_batch": per_batch,
        "tokens_per_step": per_batch * batches * num_ranks(),
        "max_length": MAX_LENGTH,
        "gradient_checkpointing": recomputes,
        "reshard_after_forward": not options.keep_gathered,
        "replicate": replicate,
    }
    student = make_model(size, mixer, device)
    teacher = make_model(size, mixer, device, dense=True) if stage != "sft" else None
    documents = documents_of(
        options.data,
        options.tokenizer,
        vocab_size=SIZES[size]["vocab_size"],
        num_tokens=per_batch * batches * num_ranks() * (WARMUP_STEPS + options.steps + 1),
        max_length=MAX_LENGTH,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def run(**changes: Any) -> Any:
        if stage == "align":
            return align(student, teacher, documents, AlignConfig(**common | changes), progress=False)
        if stage == "distill":
            fields = common | {"frozen": ["embeddings", "attention"]} | changes
            return distill(student, teacher, documents, DistillConfig(**fields), progress=False)
        return sft(student, documents, SFTConfig(**common | changes), progress=False)

    flops = 0.0
    if stage == "align":
        assert teacher is not None
        flops = count_align_flops(student, teacher, documents)
    result = run()
    if stage != "align":  # what trains is known once it has
        flops = count_flops(student, documents, trains=True, needs_head=True)
        flops += count_flops(teacher, documents, trains=False, needs_head=True) if teacher is not None else 0
    timed = result.metrics[WARMUP_STEPS:]
    rate = statistics.median(record["tokens_per_second"] for record in timed)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return Result(
        size=size,
        mixer=mixer,
        stage=stage,
        num_ranks=num_ranks(),
        tokens_per_batch=per_batch,
        batches=batches,
        gradient_checkpointing=recomputes,
        is_divided=is_divided(student),
        reshard_after_forward=not options.keep_gathered,
        documents=describe(documents),
        tokens_per_second=round(rate, 1),
        seconds_per_step=round(statistics.median(record["seconds"] for record in timed), 4),
        matrix_limit_share=round(rate * flops / num_ranks() / MATRIX_LIMIT, 4),
        peak_memory_gib=round(peak, 2),
        kernel_seconds=profile(lambda: run(steps=2), 2) if options.profile else {},
    )


def profile(act: Any, steps: int) -> dict[str, float]:
    """GPU seconds of one of the steps that `act` takes: in all, and of the largest kernels by name."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        act()
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        times[shorten(event.key)] += event.self_device_time_total
    largest = {"all": sum(times.values())} | dict(times.most_common(24))
    return {name: round(value / steps / 1e6, 5) for name, value in largest.items()}


def shorten(kernel: str) -> str:
    """A kernel's name without its arguments; of torch's elementwise ones, what they compute."""
    inner = re.search(r"(\w*(?:Functor|kernel_cuda|kernel_impl|_cuda)\w*)", kernel.partition("<")[2])
    return (kernel.split("<")[0].split("(")[0].removeprefix("void ") + (f" {inner[1]}" if inner else ""))[:80]


def show(result: Result) -> None:
    divided = "divided " if result.is_divided else ""
    batches = f"{result.batches} × {result.tokens_per_batch:,}"
    say(
        f"{result.size:>5} {result.mixer:6} {result.stage:8} {divided}{batches} {result.tokens_per_second:>10,.0f} tokens/s "
        f"{result.seconds_per_step:>8.3f} s/step {result.matrix_limit_share:>6.1%} of limit {result.peak_memory_gib:>6.1f} GiB"
    )
    for name, seconds in result.kernel_seconds.items():
        say(f"        {seconds * 1e3:>8.2f} ms {name}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["135m", "0.5b"])
    parser.add_argument("--mixers", nargs="+", choices=["mamba1", "mamba2"], default=["mamba1", "mamba2"])
    parser.add_argument("--stages", nargs="+", choices=["align", "distill", "sft"], default=["align", "distill", "sft"])
    parser.add_argument("--reduced", action="store_true", help="distillation alone, three timed steps a case")
    parser.add_argument("--steps", type=int, default=6, help="timed steps a case, after two")
    parser.add_argument("--batches", type=int, nargs="+", default=[1], help="micro-batches a step and rank")
    parser.add_argument("--tokens-per-batch", type=int, help="instead of each size's own")
    parser.add_argument("--data", nargs="+", default=[], help="as m1 distill takes it, or: random")
    parser.add_argument("--tokenizer", help="directory or hub name; unless given, one is trained on the text")
    parser.add_argument(
        "--replicate", nargs="+", default=["auto"], choices=["auto", "always", "never"], help="several GPUs: as m1 distill does"
    )
    parser.add_argument("--keep-gathered", action="store_true", help="several GPUs: weights stay whole until the backward pass")
    parser.add_argument("--profile", action="store_true", help="which kernels take the time")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", default="results/training.json")
    options = parser.parse_args()
    if options.reduced:
        options.stages, options.steps = ["distill"], 3
    return options


def main() -> None:
    options = parse()
    results, began = [], time.perf_counter()
    with ranks(options.device, 600) as device:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        say(f"{num_ranks()} × {name}, torch {torch.__version__}")
        setting: dict[str, Any] = {
            "device": name,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
            "revision": git_revision(),
            "command": ["python", *sys.argv],
            "matrix_limit_flops": MATRIX_LIMIT,
        }
        if num_ranks() > 1 and device.type == "cuda":
            setting["all_reduce_bytes_per_second"] = round(all_reduce_rate(device), -9)
            say(f"sums of 256 MiB over the ranks: {setting['all_reduce_bytes_per_second'] / 1e9:.0f} GB/s")
        cases = options.sizes, options.mixers, options.stages, options.batches, options.replicate
        for case in itertools.product(*cases):
            results.append(measure(*case, device, options))
            show(results[-1])
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if is_first():  # after every case: what is measured is kept
                setting["seconds"] = round(time.perf_counter() - began, 1)
                write_json(Path(options.out), {"setting": setting, "results": [asdict(result) for result in results]})


if __name__ == "__main__":
    main()
