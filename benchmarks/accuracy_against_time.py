"""What the votes of more samples cost in seconds: the same problems, 1 to 64 samples each, any models in one engine.

    python benchmarks/accuracy_against_time.py hybrid=models/distilled transformer=models/qwen --problems gsm8k_test.jsonl \
        --samples 1 4 16 64 --out results/accuracy_against_time.json --plot results/accuracy_against_time.svg

Each line is a run of its own, all problems at once on one GPU: the seconds are of sampling alone, from the first prompt to the
last token, measured and not computed from a throughput; kernels are compiled and graphs captured before. Models measured in
commands of their own, on GPUs side by side, are joined by

    python benchmarks/accuracy_against_time.py --join a.json b.json --out joined.json --plot joined.svg
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from m1.backends.engine import engine_backend
from m1.engine import Engine
from m1.evaluation.report import Curve, curve_plot
from m1.evaluation.runner import evaluate
from m1.evaluation.sampling import Generate, Sample, SampleRequest, Watch
from m1.modeling.loading import choose_device, inference_dtype
from m1.reasoning.problems import Problem, read_problems
from m1.storage import git_revision, write_json

COLUMNS = ("model", "samples", "vote", "pass@1", "seconds", "tokens/s", "tokens an answer")


def timed(generate: Generate, seconds: list[float]) -> Generate:
    """`generate` that notes how long each call took, without what judges its samples meanwhile."""

    def call(requests: Sequence[SampleRequest], watch: Watch) -> list[list[Sample]]:
        began = time.perf_counter()
        found = generate(requests, watch)
        seconds.append(time.perf_counter() - began)
        return found

    return call


def measure(
    engine: Engine, problems: Sequence[Problem], num_samples: int, options: argparse.Namespace, records: Path
) -> dict[str, Any]:
    """One run: `num_samples` solutions of each problem, their vote, and the seconds that sampling took."""
    params = {"temperature": options.temperature, "max_tokens": options.max_new_tokens, "seed": options.seed + num_samples}
    seconds: list[float] = []
    records.unlink(missing_ok=True)  # times are of whole runs only, so nothing is continued
    summary = evaluate(
        problems, timed(engine_backend(engine), seconds), num_samples=num_samples, params=params, records_path=records
    )
    num_tokens = summary["mean_tokens"] * num_samples * len(problems)
    return {
        "num_samples": num_samples,
        "vote": summary["maj@k"][str(num_samples)],
        "pass@1": summary["pass@1"],
        "pass@1_standard_error": summary["pass@1_standard_error"],
        "pass@k": summary["pass@k"][str(num_samples)],
        "seconds": sum(seconds),
        "tokens_per_second": num_tokens / sum(seconds),
        "mean_tokens": summary["mean_tokens"],
        "truncation_rate": summary["truncation_rate"],
    }


def rows_of(name: str, model: str, problems: Sequence[Problem], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    device = choose_device(options.device)
    with Engine(
        model,
        dtype=inference_dtype(device),
        device=device,
        max_num_seqs=options.num_seqs,
        max_model_len=options.max_new_tokens + options.max_prompt,
        quantization="fp8" if options.fp8 else None,
        kv_cache_dtype="fp8" if options.fp8 else "auto",
    ) as engine:
        engine.warm_up()
        for number, num_samples in enumerate([options.samples[0], *options.samples]):  # the first run of all is not counted
            records = options.records / f"{name}-{num_samples}.jsonl.gz"
            row = {"name": name, "model": model, "num_problems": len(problems)}
            row |= measure(engine, problems, num_samples, options, records)
            if number:
                yield row


def line(row: dict[str, Any]) -> str:
    cells = (row["name"], row["num_samples"], f"{row['vote']:.1%}", f"{row['pass@1']:.1%}", f"{row['seconds']:.1f}")
    return "| " + " | ".join(map(str, (*cells, f"{row['tokens_per_second']:,.0f}", f"{row['mean_tokens']:.0f}"))) + " |"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    names = list(dict.fromkeys(row["name"] for row in rows))
    curves = []
    for color, name in enumerate(names):
        mine = [row for row in rows if row["name"] == name]
        curves.append(Curve(name, [row["seconds"] for row in mine], [row["vote"] for row in mine], color))
    label = f"seconds for {rows[0]['num_problems']:,} problems, 1 to {max(row['num_samples'] for row in rows)} samples each"
    path.parent.mkdir(parents=True, exist_ok=True)
    curve_plot(curves, x_label=label, y_label="vote is right").savefig(path, bbox_inches="tight", metadata={"Date": None})


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=MODEL", help="a name for the plot and a directory")
    parser.add_argument("--problems", help="JSON lines")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many problems; 0: all")
    parser.add_argument("--samples", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--max-prompt", type=int, default=1024, help="tokens of the longest prompt")
    parser.add_argument("--num-seqs", type=int, default=1024, help="sequences that the engine runs at once")
    parser.add_argument("--fp8", action="store_true", help="weights, keys and values in fp8")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--records", type=Path, default=Path("runs/accuracy_against_time"), help="completions, a file a run")
    parser.add_argument("--join", nargs="+", type=Path, default=[], help="measure nothing: these results as one")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="an image to write")
    options = parser.parse_args(arguments)
    if bool(options.join) == bool(options.models):
        parser.error("give NAME=MODEL to measure, or --join FILE… to join what was measured")
    if options.models and not options.problems:
        parser.error("--problems is needed")
    for text in options.models:
        if not all(text.partition("=")):
            parser.error(f"{text!r}: expected NAME=MODEL")
    return options


def joined(paths: Sequence[Path]) -> dict[str, Any]:
    """Several results as one; the settings must be the same but for the models, or the lines could not be compared."""
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    for path, content in zip(paths, contents, strict=True):
        for name, value in contents[0]["setting"].items():
            if name != "commands" and content["setting"][name] != value:
                raise ValueError(f"{path}: {name} is {content['setting'][name]!r}, in {paths[0]} {value!r}")
    commands = [command for content in contents for command in content["setting"]["commands"]]
    rows = [row for content in contents for row in content["rows"]]
    return {"setting": contents[0]["setting"] | {"commands": commands}, "rows": rows}


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.join:
        result = joined(options.join)
    else:
        problems = read_problems(options.problems)[: options.limit or None]
        device = choose_device(options.device)
        setting = {
            "problems": [Path(options.problems).name, len(problems)],
            "temperature": options.temperature,
            "max_new_tokens": options.max_new_tokens,
            "num_seqs": options.num_seqs,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
            "revision": git_revision(),
            "torch": torch.__version__,
            "commands": [["python", *sys.argv]],
        }
        result = {"setting": setting, "rows": []}
        options.records.mkdir(parents=True, exist_ok=True)
        print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
        for text in options.models:
            name, _, model = text.partition("=")
            for row in rows_of(name, model, problems, options):
                result["rows"].append(row)
                write_json(options.out, result)
                print(line(row), flush=True)
    write_json(options.out, result)
    if options.plot:
        plot(result["rows"], options.plot)


if __name__ == "__main__":
    main()
