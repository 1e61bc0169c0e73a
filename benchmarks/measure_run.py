"""How a training run's models do on what it did not see: KL to the Transformer and problems solved, against tokens.

    python benchmarks/measure_run.py models/distilled --teacher models/qwen --data data/qwen \
        --dev runs/problems/gsm8k_train_dev.jsonl

The models are those that the run began with, exported on its way (--export-every) and ended with; hybrid_arms.py says what is
measured. Each becomes a line of measured.jsonl in the run's directory, which `m1 report` plots; one that has its line is passed
over, so this can be run again while the training goes on. Completions are written into measured/ beside it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from hybrid_arms import Bench, add_options

from m1.modeling.loading import load_model
from m1.run_page import MEASURED, METRICS
from m1.storage import RUN_CONFIG
from m1.training.metrics import read_metrics
from m1.training.run_directory import MODEL_CONFIG


def models_of(run: Path) -> Iterator[tuple[int, Path]]:
    """(step, model) in their order."""
    config = json.loads((run / RUN_CONFIG).read_text(encoding="utf-8"))["config"]
    yield 0, Path(config["model"])
    for path in sorted((run / "exports").glob("step-*")):
        yield int(path.name.removeprefix("step-")), path
    if (run / MODEL_CONFIG).is_file():
        yield config["steps"], run


def tokens_a_step(run: Path) -> float:
    """Mean over the lines of the log, of which there may be fewer than steps."""
    records = read_metrics(run / METRICS)
    return sum(record["tokens"] for record in records) / len(records)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a training run")
    add_options(parser)
    options = parser.parse_args(arguments)
    if not (options.run / RUN_CONFIG).is_file():
        raise FileNotFoundError(f"{options.run}: no {RUN_CONFIG} in it; expected the directory of a training run")
    path, bench = options.run / MEASURED, Bench(options)
    known = {record["step"] for record in read_metrics(path)} if path.is_file() else set()
    for step, source in models_of(options.run):
        if step in known:
            continue
        model = load_model(source, dtype=torch.float32, device=bench.device)
        found = bench.measure(model, options.run / "measured" / f"step-{step:08d}.jsonl.gz", has_speed=False)
        dev = found.pop("dev")
        line = {"step": step, "tokens": round(step * tokens_a_step(options.run)), **found}
        line |= {"pass_at_1": dev["pass@1"], "pass_at_1_error": dev["pass@1_standard_error"], "length": dev["mean_tokens"]}
        line |= {"truncated": dev["truncation_rate"], "no_answer": dev["no_answer_rate"]}
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"step {step}: KL {line.get('kl', 0.0):.4f}, pass@1 {line['pass_at_1']:.1%}, {line['length']:.0f} tokens",
            flush=True,
        )


if __name__ == "__main__":
    main()
