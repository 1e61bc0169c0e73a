"""Generation speed of the engine on one GPU, with random weights of known dimensions.

    python benchmarks/engine.py                                    # every case in full; JSON into results/engine.json
    python benchmarks/engine.py --cases m1-3b/32/2048@steps,run m1-3b+fp8/32/2048
    python benchmarks/engine_cpu.py                                # on a CPU, against transformers' generate

A case is model/sequences/new tokens: so many prompts of 256 random tokens at once, end tokens ignored, temperature 0.7; tokens
a second count from the first prompt to the last token, prefill included. "+fp8" after the model: fp8 weights, fp8 keys and
values, bf16 states; "+bf16-states": those states alone. "@" names the measures, all of them otherwise. "reasoner" instead of
a number of tokens draws them as a reasoner's (log-normal, mean 283, at most 512), 16 samples a prompt of 100 tokens, more
requests than run at once.

Measures, of which the last is what counts and the others say why:

    steps    a decode step alone (its graph replayed), at some lengths of context, beside what bytes and operations allow
    prefill  all prompts, with one token each
    profile  32 steps of the running engine: time by class of kernel, and the share of time in which the GPU did nothing
    run      the whole case, after a short one in which kernels are compiled and graphs captured
    warm     that short one alone, in little memory: fills Triton's cache, beside whatever else runs

Where a case is not run, "estimate" is its tokens a second from the first two: prefill, and the steps' times between the
measured lengths drawn as straight lines. It is printed beside a run too, to be judged by it.
"""

import argparse
import json
import math
import platform
import random
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from engine_models import random_model, step_cost
from engine_profile import StepWatch, profile

from m1.engine import Engine, SamplingParams
from m1.engine.graphs import Key, next_of
from m1.modeling import M1ForCausalLM
from m1.storage import git_revision, write_json

CASES = [
    "m1-3b/32/2048",
    "m1-3b/512/2048",
    "m1-3b/128/4096",
    "m1-3b/128/16384@steps,prefill",
    "m1-3b/32/16384@steps,prefill",
    "m1-3b+fp8/32/2048",
    "m1-3b+fp8/512/2048",
    "m1-3b+fp8/128/4096",
    "m1-3b+bf16-states/512/2048@steps,prefill",
    "m1-0.5b/1024/reasoner",
    "llama-3b/32/2048",
    "llama-3b/128/4096@steps,prefill",
    "llama-3b/512/2048@steps,prefill",
    "llama-3b/32/16384@steps,prefill",
    "llama-3b/128/16384@steps",
]
MEASURES = ["steps", "prefill", "profile", "run"]
PROMPT = 256
PAGE_SIZE = 64
NUM_PROFILED = 32  # steps: prompts that wait start twice in them
REASONER = {"prompt": 100, "samples": 16, "mean": 283, "longest": 512, "rounds": 3}


@dataclass(frozen=True)
class Case:
    """model: a name of engine_models.MODELS; count: sequences at once; tokens: new ones of each, None for a reasoner's."""

    text: str
    model: str
    is_fp8: bool
    state_dtype: torch.dtype
    count: int
    tokens: int | None
    measures: list[str]

    @classmethod
    def parse(cls, text: str) -> "Case":
        name, _, measures = text.partition("@")
        model, count, tokens = name.split("/")
        model, _, option = model.partition("+")
        if option not in ("", "fp8", "bf16-states"):
            raise ValueError(f"--cases {text}: expected +fp8 or +bf16-states after the model, given +{option}")
        return cls(
            text=name,
            model=model,
            is_fp8=option == "fp8",
            state_dtype=torch.bfloat16 if option else torch.float32,
            count=int(count),
            tokens=None if tokens == "reasoner" else int(tokens),
            measures=measures.split(",") if measures else MEASURES,
        )

    @property
    def longest(self) -> int:
        return REASONER["prompt"] + REASONER["longest"] if self.tokens is None else PROMPT + self.tokens


def make_engine(model: M1ForCausalLM, case: Case, arguments: argparse.Namespace) -> Engine:
    return Engine(
        model,
        max_num_seqs=case.count,
        max_model_len=case.longest,
        page_size=PAGE_SIZE,
        max_num_batched_tokens=arguments.budget,
        enable_prefix_caching=False,
        state_dtype=case.state_dtype,
        kv_cache_dtype="fp8" if case.is_fp8 else "auto",
        memory_fraction=0.25 if case.measures == ["warm"] else None,
        enforce_eager=arguments.eager,
        num_steps_ahead=arguments.ahead,
    )


# Steps alone


def decode_seconds(engine: Engine, num_sequences: int, context: int, num_steps: int = 20) -> float | None:
    """Seconds of a decode step of sequences that have `context` tokens, whose states and pages hold random numbers.

    None if the pages of so many do not fit.
    """
    runner = engine.runner
    runner.allocate()
    graphs = runner._current_graphs()
    pages = -(-(context + num_steps + 8) // PAGE_SIZE)
    if pages * num_sequences > engine.capacity.num_pages:
        return None
    slots = torch.arange(num_sequences, device=runner.device)
    runner._block_tables[:num_sequences, :pages] = torch.arange(pages * num_sequences, device=runner.device).view(-1, pages)
    runner._integers[0, :num_sequences] = torch.randint(1, 100, (num_sequences,), device=runner.device)
    runner._integers[1, :num_sequences] = context
    runner._floats[0, :num_sequences] = 0.7
    key = Key(next_of(graphs.sizes, num_sequences), next_of(graphs.widths, pages), 0) if graphs else None
    rows = torch.from_numpy(runner.pad(slots.cpu().numpy(), key.size)).to(runner.device) if key else slots

    @torch.inference_mode()
    def step() -> None:
        if key:
            graphs.run(runner.decode, key, rows)
        else:
            runner.decode(rows, pages)

    for _ in range(4):
        step()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num_steps):
        step()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000 / num_steps


def contexts_of(case: Case) -> list[int]:
    return sorted({PROMPT, (PROMPT + case.longest) // 2, case.longest - 64})


def measure_steps(engine: Engine, case: Case) -> list[dict[str, Any]]:
    assert engine.runner.state is not None
    for stack in (*engine.runner.state.slot_stacks, *engine.runner.state.page_stacks):
        for layer in stack:
            if layer.dtype == torch.uint8:  # e4m3 numbers between -1 and 1
                layer.random_(0, 56).add_(128 * torch.randint_like(layer, 2))
            else:
                layer.normal_(0, 0.5)
    found = []
    for context in contexts_of(case):
        cost = step_cost(engine.model, case.count, context, case.is_fp8, case.state_dtype)
        seconds = decode_seconds(engine, case.count, context)
        if seconds is None:
            print(f"  context {context:6}: does not fit", flush=True)
            continue
        found.append(
            {"context": context, "milliseconds": 1000 * seconds, "limit_milliseconds": 1000 * cost.seconds} | asdict(cost)
        )
        print(
            f"  context {context:6}: {1000 * seconds:7.3f} ms, {case.count / seconds:9,.0f} tokens/s; limit "
            f"{1000 * cost.seconds:6.3f} ms ({cost.seconds / seconds:.0%} reached)",
            flush=True,
        )
    return found


# The engine


def requests_of(case: Case, vocab_size: int) -> list[tuple[list[int], SamplingParams]]:
    """Prompts and what is asked of them. The reasoner's lengths are one to a request: samples of a prompt share them."""
    rng = random.Random(0)

    def prompt(length: int) -> list[int]:
        return [rng.randrange(1, vocab_size) for _ in range(length)]

    if case.tokens is not None:
        params = SamplingParams(temperature=0.7, max_tokens=case.tokens, ignore_eos=True, seed=0)
        return [(prompt(PROMPT), params) for _ in range(case.count)]
    sigma = 0.5
    requests = []
    for index in range(REASONER["rounds"] * case.count // REASONER["samples"]):
        length = round(rng.lognormvariate(math.log(REASONER["mean"]) - sigma**2 / 2, sigma))
        limit = max(16, min(REASONER["longest"], length))
        params = SamplingParams(n=REASONER["samples"], temperature=0.7, max_tokens=limit, ignore_eos=True, seed=index)
        requests.append((prompt(REASONER["prompt"]), params))
    return requests


def submit_all(engine: Engine, requests: list[tuple[list[int], SamplingParams]], divisor: int = 1) -> int:
    """All of them, with a `divisor`-th of their tokens; returns how many tokens they will have."""
    total = 0
    for prompt, params in requests:
        params = replace(params, max_tokens=max(1, params.max_tokens // divisor))
        engine.submit(prompt, params)
        total += params.n * params.max_tokens
    return total


def warm_up(engine: Engine, case: Case) -> None:
    """The case in small: every size of batch that filling and draining the engine meets, every width of block tables."""
    start = time.perf_counter()
    engine.warm_up()
    requests = requests_of(case, engine.model.config.vocab_size)
    submit_all(engine, requests, divisor=8 if case.tokens is None else max(1, case.tokens // 24))
    while engine.has_work:
        engine.step()
    torch.cuda.synchronize()
    print(f"  warm after {time.perf_counter() - start:.1f} s", flush=True)


def measure_prefill(engine: Engine, case: Case) -> dict[str, Any]:
    """Seconds for all prompts and one token each, once kernels are compiled."""
    prompts = [prompt for prompt, _ in requests_of(case, engine.model.config.vocab_size)]
    params = SamplingParams(temperature=0.7, max_tokens=1, ignore_eos=True, seed=0)
    engine.generate(prompts[:64], params)
    torch.cuda.synchronize()
    start = time.perf_counter()
    engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    count = sum(map(len, prompts))
    print(f"  prefill: {count:,} tokens in {seconds:.2f} s: {count / seconds:,.0f} tokens/s", flush=True)
    return {"tokens": count, "seconds": seconds}


def estimate(case: Case, result: dict[str, Any]) -> float | None:
    """Tokens a second from prefill and steps, when all sequences run at once; None where they don't."""
    steps = result.get("steps", [])
    if case.tokens is None or "prefill" not in result or len(steps) < len(contexts_of(case)):
        return None
    contexts = np.arange(PROMPT, PROMPT + case.tokens)
    times = np.interp(contexts, [step["context"] for step in steps], [step["milliseconds"] / 1000 for step in steps])
    return case.count * case.tokens / (result["prefill"]["seconds"] + times.sum())


def measure_profile(engine: Engine, case: Case) -> dict[str, Any]:
    """In the middle of the case: once every place is taken, some steps on."""
    submit_all(engine, requests_of(case, engine.model.config.vocab_size))
    num_places = engine.capacity.max_num_seqs
    engine.step()
    while engine.scheduler.num_waiting and engine.scheduler.table.num_sequences < 0.9 * num_places:
        engine.step()
    for _ in range(40):
        engine.step()
    found = profile(engine.step, NUM_PROFILED)
    found.show()
    engine._core.drop_all(RuntimeError("measured"))
    return asdict(found)


def measure_run(engine: Engine, case: Case) -> dict[str, Any]:
    requests = requests_of(case, engine.model.config.vocab_size)
    torch.cuda.synchronize()
    before, start = engine.metrics, time.perf_counter()
    total = submit_all(engine, requests)
    watch = StepWatch(engine)
    while engine.has_work:
        watch.step()
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    after = engine.metrics
    assert after.num_generated_tokens - before.num_generated_tokens == total
    graphs = engine.runner._graphs
    found = {
        "tokens": total,
        "seconds": seconds,
        "tokens_per_second": total / seconds,
        "steps": after.num_steps - before.num_steps,
        "preemptions": after.num_preemptions - before.num_preemptions,
        "graphs": graphs.num_captured if graphs else 0,
        "capture_seconds": graphs.capture_seconds if graphs else 0.0,
        **watch.summary(),
    }
    print(
        f"  run: {total:,} tokens in {seconds:.2f} s: {total / seconds:,.0f} tokens/s; {found['steps']} steps, "
        f"{found['preemptions']} preemptions, {found['graphs']} graphs ({found['capture_seconds']:.1f} s)",
        flush=True,
    )
    watch.show()
    return found


def measure(case: Case, model: M1ForCausalLM, arguments: argparse.Namespace) -> dict[str, Any]:
    print(case.text, flush=True)
    torch.cuda.reset_peak_memory_stats()
    engine = make_engine(model, case, arguments)
    result: dict[str, Any] = {"case": case.text}
    if "steps" in case.measures:
        result["steps"] = measure_steps(engine, case)
    if "prefill" in case.measures:
        result["prefill"] = measure_prefill(engine, case)
    if (found := estimate(case, result)) is not None:
        result["estimated_tokens_per_second"] = found
        print(f"  estimate: {found:,.0f} tokens/s", flush=True)
    if {"profile", "run", "warm"} & set(case.measures):
        warm_up(engine, case)
    if "profile" in case.measures:
        result["profile"] = measure_profile(engine, case)
    if "run" in case.measures:
        result["run"] = measure_run(engine, case)
    result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    engine.sleep()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="MODEL[+fp8|+bf16-states]/SEQUENCES/TOKENS[@MEASURE,…]")
    parser.add_argument("--mixer", choices=["mamba1", "mamba2"], default="mamba1")
    parser.add_argument("--budget", type=int, help="max_num_batched_tokens")
    parser.add_argument("--ahead", type=int, help="steps launched before one is read")
    parser.add_argument("--eager", action="store_true", help="no CUDA graphs")
    parser.add_argument("--out", default="results/engine.json")
    parser.add_argument("--revision", default="", help="if this directory is no git repository")
    parser.add_argument("--append", action="store_true", help="to what the file holds, instead of anew")
    arguments = parser.parse_args()
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    earlier = json.loads(out.read_text())["records"] if arguments.append and out.exists() else []
    record: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "revision": arguments.revision or git_revision(),
        "hardware": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "results": [],
    }
    models: dict[tuple[str, bool], M1ForCausalLM] = {}
    for case in map(Case.parse, arguments.cases):
        key = case.model, case.is_fp8
        if key not in models:
            models.clear()
            torch.cuda.empty_cache()  # or its weights would lie within what was once a cache, and hold all of that
            models[key] = random_model(case.model, arguments.mixer, case.is_fp8)
        torch.cuda.empty_cache()
        record["results"].append(measure(case, models[key], arguments))
        write_json(out, {"records": [*earlier, record]})  # after each case: what was measured outlives an interrupt
    print(f"written to {out}")


if __name__ == "__main__":
    main()
