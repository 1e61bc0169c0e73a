"""Which start, which mixer, which attention layers: hybrids of one Transformer after the same tokens, measured alike.

    python benchmarks/ablation.py --teacher models/qwen --data data/qwen --dev runs/problems/gsm8k_train_dev.jsonl \
        --recipe recipes/qwen2.5-coder-0.5b.toml --align-tokens 4e6 --distill-tokens 10e6 --out results/ablation.json

For each mixer it makes and measures (hybrid_arms.py says what is measured)
    start      the hybrid as converted, M1's start and the improved one, with evenly spaced attention
    aligned    all layers converted and aligned, then evenly spaced layers restored
    even       that after distillation
    selected   the same mixers with the layers restored that `m1 select` chooses, and that after distillation
    paper      M1's way: M1's start with evenly spaced attention, distilled over the tokens of both stages

All arms see the same documents; choices are made on the problems of --dev, which must not be among those of --data
(benchmarks/split_problems.py). Every row is written when it is known. With --seconds, a row that would take longer than is left
is passed over; the same command run again does what is missing, from the aligned models that lie in --work.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from hybrid_arms import Bench, add_options, curve

from m1.modeling import M1ForCausalLM
from m1.modeling.loading import choose_device, load_model
from m1.storage import git_revision, new_directory, write_json
from m1.training.loop import TrainResult

# What is guessed of a row before anything has been measured.
FIRST_RATE, MEASURING_SECONDS = 60_000.0, 20.0  # trained tokens a second, seconds of measuring


class Results:
    """The file of results: settings that may not change between runs that go on with it, and rows by name."""

    def __init__(self, path: Path, setting: dict[str, Any]) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"setting": setting, "rows": {}}
        before, now = found["setting"]["options"], json.loads(json.dumps(setting["options"]))
        differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if differing:
            name = differing[0]
            raise ValueError(f"{path} was begun with {name} = {before.get(name)!r}, not {now.get(name)!r}; give another --out")
        self.content = found
        self.rows: dict[str, dict[str, Any]] = found["rows"]

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)


class Clock:
    """The seconds that are left, and how quickly tokens are trained on."""

    def __init__(self, seconds: float) -> None:
        self.began, self.seconds, self.rate = time.perf_counter(), seconds, FIRST_RATE

    @property
    def left(self) -> float:
        return self.seconds - (time.perf_counter() - self.began) if self.seconds else float("inf")

    def has_time_for(self, tokens: int) -> bool:
        return tokens / self.rate + MEASURING_SECONDS <= self.left

    def saw(self, result: TrainResult) -> None:
        """The rate of a run's second half: the first steps compile kernels."""
        later = result.metrics[len(result.metrics) // 2 :]
        self.rate = sum(record["tokens"] for record in later) / max(1e-9, sum(record["seconds"] for record in later))


@dataclass(frozen=True)
class Row:
    """One line of the table: how many tokens are trained on for it, at most, and what makes its model and facts about it."""

    name: str
    tokens: int
    make: Callable[[], tuple[M1ForCausalLM, dict[str, Any]]]


class Arms:
    """The arms of one mixer."""

    def __init__(self, bench: Bench, mixer: str, clock: Clock) -> None:
        self.bench, self.mixer, self.clock, self.options = bench, mixer, clock, bench.options

    def rows(self) -> Iterator[Row]:
        """In the order of what is learnt from them."""
        for_align, for_distill = int(self.options.align_tokens), int(self.options.distill_tokens)
        even = self.bench.even_layers

        def aligning() -> int:  # asked when the row's turn has come
            return 0 if self.aligned_path.is_dir() else for_align

        for start in ("m1", "improved"):
            yield Row(f"{self.mixer} start {start}", 0, partial(self.converted, start))
        yield Row(f"{self.mixer} aligned even", aligning(), lambda: (self.restored(even), self.facts_of_alignment()))
        yield Row(f"{self.mixer} even", aligning() + for_distill, lambda: self.distilled(self.restored(even), "even"))
        yield Row(f"{self.mixer} aligned selected", aligning() + for_align, self.with_selection)
        yield Row(f"{self.mixer} selected", for_distill, lambda: self.distilled(self.with_selection()[0], "selected"))
        yield Row(f"{self.mixer} paper", for_align + for_distill, self.as_in_the_paper)

    def converted(self, start: str) -> tuple[M1ForCausalLM, dict[str, Any]]:
        began = time.perf_counter()
        model = self.bench.convert(self.mixer, start, self.bench.even_layers)
        return model, {"seconds_converting": round(time.perf_counter() - began, 1)}

    @property
    def aligned_path(self) -> Path:
        return self.options.work / f"aligned-{self.mixer}"

    def aligned(self) -> M1ForCausalLM:
        """All layers mixers, aligned; made once and kept as `m1 align` would keep it."""
        if not self.aligned_path.is_dir():
            student = self.bench.convert(self.mixer, "improved", [])
            result = self.bench.align(student, int(self.options.align_tokens))
            write_json(self.aligned_path.with_suffix(".json"), training_facts(result, "loss"))
            self.save(student, self.aligned_path)
        return load_model(self.aligned_path, dtype=torch.float32, device=self.bench.device)

    def facts_of_alignment(self) -> dict[str, Any]:
        return {"align": json.loads(self.aligned_path.with_suffix(".json").read_text(encoding="utf-8"))}

    def restored(self, layers: list[int]) -> M1ForCausalLM:
        return self.bench.restore(self.aligned(), self.mixer, layers)

    def with_selection(self) -> tuple[M1ForCausalLM, dict[str, Any]]:
        """The aligned mixers with the layers restored that `m1 select` chooses, which is asked once."""
        path = self.options.work / f"selection-{self.mixer}.json"
        if not path.is_file():
            began = time.perf_counter()
            selection = self.bench.select(self.aligned())
            write_json(path, selection.as_json() | {"seconds": round(time.perf_counter() - began, 1)})
        found = json.loads(path.read_text(encoding="utf-8"))
        facts = {"ranking": found["ranking"], "seconds_selecting": found["seconds"]}
        return self.restored(found["attention_layers"]), self.facts_of_alignment() | facts

    def as_in_the_paper(self) -> tuple[M1ForCausalLM, dict[str, Any]]:
        tokens = int(self.options.align_tokens) + int(self.options.distill_tokens)
        return self.distilled(self.converted("m1")[0], "paper", tokens)

    def distilled(self, student: M1ForCausalLM, name: str, tokens: int = 0) -> tuple[M1ForCausalLM, dict[str, Any]]:
        result = self.bench.distill(student, tokens or int(self.options.distill_tokens))
        self.clock.saw(result)
        self.save(student, self.options.work / f"distilled-{self.mixer}-{name}")
        before = {} if name == "paper" else self.facts_of_alignment()
        return student, before | {"distill": training_facts(result, "kl")}

    def save(self, model: M1ForCausalLM, path: Path) -> None:
        """As a training stage does: tied weights once, in bf16."""
        state = {name: weight.detach().to(torch.bfloat16) for name, weight in model.named_parameters()}
        with new_directory(path, overwrite=True) as directory:
            model.save_pretrained(directory, state_dict=state)
            self.bench.tokenizer.save_pretrained(directory)


def training_facts(result: TrainResult, metric: str) -> dict[str, Any]:
    return {
        "tokens": result.tokens,
        "steps": result.steps,
        "seconds": round(result.seconds, 1),
        "metric": metric,
        "curve": curve(result, metric),
    }


def all_rows(bench: Bench, options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    yield Row("teacher", 0, lambda: (bench.teacher, {}))
    for mixer in options.mixers:
        yield from Arms(bench, mixer, clock).rows()


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--recipe", required=True, help="where [align] and [distill] are; steps and batches come from here")
    parser.add_argument("--set", nargs="+", default=[], help="over the recipe's: distill.mixer_learning_rate=1e-4 …")
    parser.add_argument("--mixers", nargs="+", choices=("mamba1", "mamba2"), default=["mamba1", "mamba2"])
    parser.add_argument("--only", default="", help="a regular expression: only rows of such names")
    parser.add_argument("--attention-fraction", type=float, default=0.25)
    parser.add_argument("--align-tokens", type=float, default=4e6)
    parser.add_argument("--distill-tokens", type=float, default=10e6)
    parser.add_argument("--tokens-per-step", type=int, default=32768)
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--seconds", type=float, default=0.0, help="time for all; 0: no limit")
    parser.add_argument("--work", type=Path, default=Path("runs/ablation"), help="models, selections and completions")
    parser.add_argument("--out", type=Path, default=Path("results/ablation.json"))
    return parser.parse_args(arguments)


def setting_of(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    free = ("out", "work", "seconds", "device", "only", "mixers")
    return {
        "options": {name: value for name, value in sorted(vars(options).items()) if name not in free},
        "command": ["python", *sys.argv],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "revision": git_revision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": sys.version.split()[0],
    }


def show(name: str, row: dict[str, Any]) -> None:
    dev = row["dev"]
    near = f"KL {row['kl']:.4f}, agreement {row['agreement']:.1%}, " if "kl" in row else ""
    error = dev["pass@1_standard_error"] or 0.0
    print(
        f"{name:24} {near}dev {dev['pass@1']:.1%} ± {error:.1%} ({dev['mean_tokens']:.0f} tokens, {dev['truncation_rate']:.0%} "
        f"cut off), {row['decode']['tokens_per_second']:,.0f} tokens/s, {row['seconds']:.0f} s",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    clock = Clock(options.seconds)
    results = Results(options.out, setting_of(options, choose_device(options.device)))
    options.work.mkdir(parents=True, exist_ok=True)
    bench = Bench(options)
    for row in all_rows(bench, options, clock):
        if row.name in results.rows or not re.search(options.only, row.name):
            continue
        if not clock.has_time_for(row.tokens):
            print(f"{row.name:24} passed over: {clock.left:.0f} s are left", flush=True)
            continue
        began = time.perf_counter()
        model, facts = row.make()
        records = options.work / "records" / f"{row.name.replace(' ', '-')}.jsonl.gz"
        measured = bench.measure(model, records)
        del model
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()
        results.add(row.name, facts | measured | {"seconds": round(time.perf_counter() - began, 1)})
        show(row.name, results.rows[row.name])


if __name__ == "__main__":
    main()
