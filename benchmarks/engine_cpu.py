"""Sampling throughput of the engine and of transformers' `generate`, with the same model, on a CPU.

    python benchmarks/engine_cpu.py                                    # table; JSON into results/engine_cpu.json
    python benchmarks/engine_cpu.py --model runs/mine --dtype float32  # a checkpoint instead of random weights

The default model has SmolLM2-135M's dimensions, every fourth layer attention, the others Mamba-1, and random weights. End
tokens are ignored and every completion has a length of its own, so both sides count the same tokens. Workloads:

    equal    one batch, all completions equally long: nobody waits for anybody, so this compares the steps alone
    mixed    more requests than fit at once, of lengths as a reasoner's (log-normal): `generate` takes one batch after the
             other and runs each until its longest is done; the engine fills every place that becomes free
    samples  the same with several samples of each prompt, which the engine prefills once

Both sides run the same number of sequences at once. `generate` filters by nothing but the temperature.
"""

import argparse
import copy
import math
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from m1.engine import Engine, SamplingParams
from m1.engine.weights import for_sampling
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.loading import load_model
from m1.storage import git_revision, write_json

ATTENTION_EVERY = 4


@dataclass(frozen=True)
class Workload:
    """prompts: token ids; lengths: of each prompt's completions."""

    name: str
    prompts: list[list[int]]
    lengths: list[list[int]]

    @property
    def num_tokens(self) -> int:
        return sum(map(sum, self.lengths))


@dataclass(frozen=True)
class Result:
    workload: str
    temperature: float
    num_sequences: int
    num_prompt_tokens: int
    num_tokens: int
    longest: int
    engine_seconds: float
    generate_seconds: float

    @property
    def ratio(self) -> float:
        return self.generate_seconds / self.engine_seconds


def smollm2_sized(mixer: str) -> M1ForCausalLM:
    """A hybrid with random weights and SmolLM2-135M's dimensions."""
    layers = ["full_attention" if i % ATTENTION_EVERY == ATTENTION_EVERY - 1 else "linear_attention" for i in range(30)]
    torch.manual_seed(0)
    config = M1Config(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        layer_types=layers,
        mixer=mixer,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return M1ForCausalLM(config).eval()


def workloads(vocab_size: int, arguments: argparse.Namespace) -> list[Workload]:
    rng = random.Random(0)

    def prompt() -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(rng.randint(32, 160))]

    def length() -> int:
        sigma = 0.7
        drawn = round(rng.lognormvariate(math.log(arguments.mean) - sigma**2 / 2, sigma))
        return max(8, min(arguments.longest, drawn))

    prompts = [prompt() for _ in range(arguments.requests)]
    num_groups = arguments.requests // arguments.samples
    return [
        Workload("equal", prompts[: arguments.batch], [[arguments.mean]] * arguments.batch),
        Workload("mixed", prompts, [[length()] for _ in prompts]),
        Workload("samples", prompts[:num_groups], [[length() for _ in range(arguments.samples)] for _ in range(num_groups)]),
    ]


def run_engine(engine: Engine, workload: Workload, temperature: float) -> None:
    """Samples of one prompt have lengths of their own, which one request can't ask for: the host's table of decoding
    sequences is told how far each may go."""
    requests, limits = [], {}
    for prompt, lengths in zip(workload.prompts, workload.lengths, strict=True):
        params = SamplingParams(n=len(lengths), temperature=temperature, max_tokens=max(lengths), ignore_eos=True)
        request = engine.submit(prompt, params)
        requests.append((request, lengths))
        limits |= {(request.number, index): limit for index, limit in enumerate(lengths)}
    table = engine.scheduler.table
    start = table.start

    def start_with_limit(sequence, capacity):
        start(sequence, capacity)
        table.limit(sequence, limits[sequence.key])

    table.start = start_with_limit
    try:
        while engine.has_work:
            engine.step()
    finally:
        table.start = start
    generated = [sum(len(c.token_ids) for c in request.completions.values()) for request, _ in requests]
    assert generated == [sum(lengths) for _, lengths in requests]


@torch.inference_mode()
def run_generate(model: M1ForCausalLM, workload: Workload, temperature: float, batch: int) -> None:
    """`batch` sequences after the other as left-padded batches, each until its longest is done."""
    num_samples = len(workload.lengths[0])
    num_prompts = batch // num_samples
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    for low in range(0, len(workload.prompts), num_prompts):
        prompts = workload.prompts[low : low + num_prompts]
        longest = max(map(max, workload.lengths[low : low + num_prompts]))
        width = max(map(len, prompts))
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        output = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=longest,
            eos_token_id=None,
            pad_token_id=0,
            num_return_sequences=num_samples,
            **sampling,
        )
        assert output.shape == (len(prompts) * num_samples, width + longest)


def seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(engine: Engine, model: M1ForCausalLM, workload: Workload, temperature: float, batch: int) -> Result:
    engine.cache.forget_prefixes()
    return Result(
        workload=workload.name,
        temperature=temperature,
        num_sequences=sum(map(len, workload.lengths)),
        num_prompt_tokens=sum(map(len, workload.prompts)),
        num_tokens=workload.num_tokens,
        longest=max(map(max, workload.lengths)),
        engine_seconds=seconds(lambda: run_engine(engine, workload, temperature)),
        generate_seconds=seconds(lambda: run_generate(model, workload, temperature, batch)),
    )


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="checkpoint directory; random weights without it")
    parser.add_argument("--mixer", choices=["mamba1", "mamba2"], default="mamba1", help="of the random model")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of both sides")
    parser.add_argument("--batch", type=int, default=64, help="sequences at once, on both sides")
    parser.add_argument("--requests", type=int, default=192, help="sequences in the second and third workload")
    parser.add_argument("--samples", type=int, default=8, help="samples of a prompt in the third workload")
    parser.add_argument("--mean", type=int, default=64, help="mean length of a completion")
    parser.add_argument("--longest", type=int, default=256, help="longest completion")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", default="results/engine_cpu.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    model = load_model(arguments.model, dtype=dtype) if arguments.model else smollm2_sized(arguments.mixer).to(dtype)
    engine = Engine(for_sampling(copy.deepcopy(model)), max_num_seqs=arguments.batch)
    warm_up = Workload("warm-up", [[1, 2, 3]] * 4, [[3]] * 4)
    measure(engine, model, warm_up, 1.0, 4)

    print(f"{'workload':10}{'T':>5}{'tokens':>8}{'longest':>9}{'engine tok/s':>14}{'generate tok/s':>16}{'ratio':>7}")
    results = []
    for temperature in arguments.temperatures:
        for workload in workloads(model.config.vocab_size, arguments):
            result = measure(engine, model, workload, temperature, arguments.batch)
            results.append(asdict(result) | {"ratio": result.ratio})
            print(
                f"{result.workload:10}{temperature:5.1f}{result.num_tokens:8}{result.longest:9}"
                f"{result.num_tokens / result.engine_seconds:14.0f}{result.num_tokens / result.generate_seconds:16.0f}"
                f"{result.ratio:7.2f}",
                flush=True,
            )
    record = {
        "command": " ".join(["python", *sys.argv]),
        "revision": git_revision(),
        "hardware": {"processor": processor(), "threads": arguments.threads},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "model": arguments.model or f"random, SmolLM2-135M's dimensions, {arguments.mixer}",
        "dtype": arguments.dtype,
        "batch": arguments.batch,
        "results": results,
    }
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, record)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
