"""A GRPO step by phase: sampling, rewards, training; tokens a second of each, and peak memory.

    python benchmarks/grpo.py                                # 0.5B, 64 problems × 16 samples × 512 tokens; results/grpo.json
    torchrun --nproc-per-node 4 benchmarks/grpo.py           # the same step shared by 4 GPUs

Models have the dimensions of training.py's with random weights, every fourth layer attention. Such a model never ends a
completion, so every sample has the greatest length: a trained one's step is shorter. Prompts have 100 random tokens. Every
other sample is rewarded, so that all groups teach; what checking answers costs is not in it (about 0.4 ms each where it takes
algebra, in several processes). The first step, which compiles kernels and takes memory, is shown and not counted.
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from training import SIZES, make_model
from transformers import PreTrainedTokenizerFast

from m1.config import GRPOConfig
from m1.distributed import is_first, num_ranks, ranks, say
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Score
from m1.storage import git_revision, write_json
from m1.training.grpo import grpo

PROMPT_TOKENS = 100
SHOWN = (
    *("seconds", "seconds_sampling", "seconds_rewards", "seconds_training", "sampled_tokens_per_second"),
    *("trained_tokens_per_second", "length", "log_prob_gap", "importance_weight"),
)


class EveryOther:
    """A scorer: full marks for every second sample."""

    def score_many(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        return [Score(float(number % 2), None) for number in range(len(completions))]


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Token i is the word "i"; a prompt of the benchmark is such words. 0 ends."""
    backend = Tokenizer(models.WordLevel({str(i) if i else "<end>": i for i in range(vocab_size)}, unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def measure(options: argparse.Namespace, mixer: str, device: torch.device) -> dict[str, Any]:
    model = make_model(options.size, mixer, device)
    vocab_size = SIZES[options.size]["vocab_size"]
    generator = np.random.default_rng(0)
    problems = [
        Problem(str(i), " ".join(map(str, generator.integers(1, vocab_size, PROMPT_TOKENS))), "")
        for i in range(options.problems * (1 + options.steps))
    ]
    config = GRPOConfig(
        steps=1 + options.steps,
        problems_per_step=options.problems,
        samples_per_problem=options.samples,
        max_new_tokens=options.max_new_tokens,
        max_length=PROMPT_TOKENS + options.max_new_tokens + 1,
        tokens_per_batch=options.tokens_per_batch,
        gradient_checkpointing=options.gradient_checkpointing,
        replicate=options.replicate,
        keep_sampler=options.keep_sampler,
        suffix="",
        device=device.type,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    result = grpo(model, make_tokenizer(vocab_size), problems, config, scorer=EveryOther(), progress=False)  # type: ignore[arg-type]
    for record in result.metrics:
        say(f"{mixer} step {record['step']}: " + ", ".join(f"{key} {record[key]:,.4g}" for key in SHOWN))
    timed = result.metrics[1:]
    medians = {key: statistics.median(record[key] for record in timed) for key in SHOWN}
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    shape = {"size": options.size, "mixer": mixer, "problems": options.problems, "samples": options.samples}
    shape |= {"max_new_tokens": options.max_new_tokens, "tokens_per_batch": options.tokens_per_batch, "num_ranks": num_ranks()}
    for name in ("replicate", "gradient_checkpointing", "keep_sampler"):
        shape[name] = getattr(options, name)
    return shape | medians | {"peak_memory_gib": round(peak, 2), "steps": [{k: r[k] for k in SHOWN} for r in result.metrics]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="0.5b")
    parser.add_argument("--mixers", nargs="+", choices=["mamba1", "mamba2"], default=["mamba2"])
    parser.add_argument("--problems", type=int, default=64)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3, help="timed steps, after one")
    parser.add_argument("--tokens-per-batch", type=int, default=32768)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--replicate", default="auto", choices=["auto", "always", "never"], help="as m1 grpo has it")
    parser.add_argument("--keep-sampler", action="store_true", help="its states and captured steps stay on the device")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--out", default="results/grpo.json")
    return parser.parse_args()


def main() -> None:
    options = parse()
    with ranks(options.device, 600) as device:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        say(f"{num_ranks()} × {name}, torch {torch.__version__}")
        results = []
        for mixer in options.mixers:
            results.append(measure(options, mixer, device))
            say(f"{mixer}: {results[-1]['seconds']:.2f} s a step, {results[-1]['peak_memory_gib']:.1f} GiB")
        if is_first():
            facts = {"device": name, "torch": torch.__version__, "python": sys.version.split()[0], "revision": git_revision()}
            write_json(Path(options.out), {"setting": facts | {"command": ["python", *sys.argv]}, "results": results})


if __name__ == "__main__":
    main()
