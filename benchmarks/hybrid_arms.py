"""Making hybrids of one Transformer in memory, and measuring them alike; what is compared with what stands in ablation.py.

A measured model has: KL to the Transformer, agreement and cross-entropy on held-out samples of it; the share of held-out
problems that it solves greedily; tokens a second of the engine with many sequences at once; bytes of its state a sequence.
"""

import argparse
import itertools
import random
import time
import tomllib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from m1.backends.engine import engine_backend
from m1.conversion.bases import assemble
from m1.conversion.calibration import read_texts
from m1.conversion.convert import choose_attention_layers, convert, hybrid_config
from m1.conversion.weights import hybrid_weights, layer_weights
from m1.engine import Engine, SamplingParams
from m1.evaluation.runner import evaluate
from m1.modeling import M1ForCausalLM
from m1.modeling.loading import choose_device, inference_dtype, load_model, load_tokenizer
from m1.modeling.state import ModelState
from m1.reasoning.problems import read_problems
from m1.recipe_file import build, read_recipe
from m1.training.align import align
from m1.training.command import read_documents
from m1.training.data import make_documents
from m1.training.distill import compare, distill
from m1.training.loop import TrainResult
from m1.training.packing import Document
from m1.training.select import Selection, select
from m1.training.sources import read_rows

CURVE_POINTS = 24  # of a run's loss, kept in the results
SPEED_PROMPT, SPEED_TOKENS = 128, 256  # tokens of the prompts and completions whose speed is measured
CALIBRATION_TEXTS = 512


def add_options(parser: argparse.ArgumentParser) -> None:
    """What measuring needs to know."""
    parser.add_argument("--teacher", required=True, help="the Transformer: a directory or hub name")
    parser.add_argument("--data", nargs="+", required=True, help="its samples: files or directories of m1 sample")
    parser.add_argument("--dev", required=True, help="problems to choose by: JSON lines")
    parser.add_argument("--dev-problems", type=int, default=0, help="only the first so many; 0: all")
    parser.add_argument("--max-length", type=int, default=1536, help="of a document")
    parser.add_argument("--tokens-per-batch", type=int, default=32768)
    parser.add_argument("--held-out-tokens", type=int, default=100_000, help="targets that KL is measured on")
    parser.add_argument(
        "--selection-tokens", type=int, default=50_000, help="targets that layers are chosen by, never measured"
    )
    parser.add_argument("--max-new-tokens", type=int, default=768, help="of an answer to a problem of --dev")
    parser.add_argument("--num-seqs", type=int, default=512, help="sequences that the engine runs at once")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


class Bench:
    """The Transformer, the data, and what is done to hybrids of it.

    `options` are those of `add_options` for measuring; making takes more of them, which ablation.py adds.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, choose_device(options.device)
        self.tokenizer = load_tokenizer(options.teacher)
        self.teacher = load_model(options.teacher, dtype=inference_dtype(self.device), device=self.device)
        self.teacher.requires_grad_(False)
        self.train_data = [f"{source}:train" for source in options.data]
        held_out = self._held_out_documents()
        self.for_selection, rest = _first_tokens(held_out, options.selection_tokens)  # what chooses layers measures no KL
        self.for_measuring, _ = _first_tokens(rest, options.held_out_tokens)
        self.problems = read_problems(options.dev)[: options.dev_problems or None]

    @cached_property
    def exact(self) -> M1ForCausalLM:
        """The Transformer in fp32: what hybrids are made of."""
        return load_model(self.options.teacher, dtype=torch.float32, device=self.device).requires_grad_(False)

    @property
    def even_layers(self) -> list[int]:
        return choose_attention_layers(self.teacher.config.num_hidden_layers, self.options.attention_fraction)

    def _held_out_documents(self) -> list[Document]:
        """Samples of the problems that training leaves out, in an order that mixes the sources."""
        rows = read_rows([f"{source}:held_out" for source in self.options.data], num_problems=1, seed=0)
        random.Random(0).shuffle(rows)
        wanted = self.options.held_out_tokens + self.options.selection_tokens
        return make_documents(rows[: 1 + wanted // 4], self.tokenizer, max_length=self.options.max_length)

    # Making them.

    def convert(self, mixer: str, start: str, layers: Sequence[int]) -> M1ForCausalLM:
        """A hybrid as `m1 convert` makes it, with fp32 weights; the improved start is fitted on training data."""
        texts = list(itertools.islice(read_texts(self.train_data), CALIBRATION_TEXTS)) if start == "improved" else []
        return convert(
            self.exact,
            attention_layers=layers,
            mixer=mixer,
            start=start,
            calibration=texts,
            tokenizer=self.tokenizer,
            calibration_tokens=self.options.calibration_tokens,
        )

    def restore(self, student: M1ForCausalLM, mixer: str, layers: Sequence[int]) -> M1ForCausalLM:
        """A hybrid whose `layers` are the Transformer's attention, the others the mixers of `student`; nothing is shared."""
        config = hybrid_config(self.exact.config, layers, 0.0, mixer, "improved")
        mixers = {layer: layer_weights(student.state_dict(), layer, "mixer") for layer in config.mixer_layers}
        weights = hybrid_weights(self.exact.state_dict(), mixers)
        hybrid = assemble(
            config, {name: tensor.detach().float().clone() for name, tensor in weights.items()}, source="a hybrid"
        )
        hybrid.generation_config = self.exact.generation_config
        return hybrid.to(self.device)

    def align(self, student: M1ForCausalLM, tokens: int) -> TrainResult:
        config, documents = self._stage("align", tokens, "all")
        return align(student, self.teacher, documents, config, progress=False)

    def distill(self, student: M1ForCausalLM, tokens: int) -> TrainResult:
        config, documents = self._stage("distill", tokens, "completion")
        return distill(student, self.teacher, documents, config, progress=False)

    def select(self, student: M1ForCausalLM) -> Selection:
        """The layers that `m1 select` chooses; `student` is of no use afterwards."""
        options: dict[str, Any] = {"tokens_per_batch": self.options.tokens_per_batch // 2, "progress": False}
        return select(student, self.exact, self.for_selection, len(self.even_layers), precision=self.precision, **options)

    @property
    def precision(self) -> str:
        return "bfloat16" if self.device.type == "cuda" else "float32"

    def _stage(self, command: str, tokens: int, loss_on: str) -> tuple[Any, Sequence[Document]]:
        """The recipe's settings of a training stage, for so many tokens, and its documents."""
        options = self.options
        steps = max(1, round(tokens / options.tokens_per_step))
        values = read_recipe(options.recipe, command) | {
            "model": "",
            "out": "",
            "teacher": options.teacher,
            "data": self.train_data,
            "steps": steps,
            "tokens_per_step": options.tokens_per_step,
            "tokens_per_batch": options.tokens_per_batch,
            "max_length": options.max_length,
            "warmup_steps": max(1, steps // 20),
            "export_every": 0,
            "precision": self.precision,
            "device": self.device.type,
        }
        values |= {key: value for stage, key, value in map(read_setting, options.set) if stage == command}
        config = build(command, values, options.recipe)
        return config, read_documents(config, self.tokenizer, loss_on)[0]

    # Measuring them.

    def measure(self, model: M1ForCausalLM, records: Path, *, has_speed: bool = True) -> dict[str, Any]:
        """All figures of a model; its completions of the held-out problems go to the file `records`."""
        began = time.perf_counter()
        found: dict[str, Any] = {"attention_layers": model.config.attention_layers}
        if model.config.mixer_layers:
            batch = self.options.tokens_per_batch // 2
            found |= compare(model, self.teacher, self.for_measuring, tokens_per_batch=batch, precision=self.precision)
        found["state_bytes"] = ModelState.bytes_per_slot(model.config, torch.bfloat16)
        found["kv_bytes_per_token"] = ModelState.bytes_per_page(model.config, 1, torch.bfloat16)
        longest = max(self.options.max_new_tokens + 512, SPEED_PROMPT + SPEED_TOKENS)
        dtype = inference_dtype(self.device)
        with Engine(model, self.tokenizer, dtype=dtype, max_num_seqs=self.options.num_seqs, max_model_len=longest) as engine:
            found["dev"] = self._solve(engine, records)
            if has_speed:
                found["decode"] = self._speed(engine)
        return found | {"seconds_measuring": round(time.perf_counter() - began, 1)}

    def _solve(self, engine: Engine, records: Path) -> dict[str, Any]:
        records.unlink(missing_ok=True)  # of a model of that name that was not measured to the end
        params = {"temperature": 0.0, "max_tokens": self.options.max_new_tokens, "seed": 0}
        summary = evaluate(self.problems, engine_backend(engine), num_samples=1, params=params, records_path=records)
        names = ("num_problems", "pass@1", "pass@1_standard_error", "mean_tokens", "truncation_rate", "no_answer_rate")
        return {name: summary[name] for name in names}

    def _speed(self, engine: Engine) -> dict[str, Any]:
        """Tokens a second with all places taken, prompts included, end tokens ignored; the second of two runs."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.options.num_seqs, SPEED_PROMPT)
        prompts = torch.randint(self.teacher.config.vocab_size // 2, shape, generator=generator).tolist()
        params = SamplingParams(temperature=0.7, max_tokens=SPEED_TOKENS, ignore_eos=True, seed=0)
        seconds = 0.0
        for _ in range(2):
            began = time.perf_counter()
            engine.generate(prompts, params)
            seconds = time.perf_counter() - began
        rate = round(self.options.num_seqs * SPEED_TOKENS / seconds, 1)
        return {"sequences": self.options.num_seqs, "new_tokens": SPEED_TOKENS, "tokens_per_second": rate}


def _first_tokens(documents: Sequence[Document], num_targets: int) -> tuple[list[Document], list[Document]]:
    """As many documents as have so many targets, and the others. Raises ValueError if nothing is left of either."""
    found = 0
    for number, document in enumerate(documents):
        if found >= num_targets:
            return list(documents[:number]), list(documents[number:])
        found += document.num_targets
    if found < num_targets:
        raise ValueError(f"--data: its held-out rows have {found:,} tokens left to measure on, {num_targets:,} are asked for")
    return list(documents), []


def read_setting(text: str) -> tuple[str, str, Any]:
    """`distill.mixer_learning_rate=1e-4` in its three parts. Raises ValueError for another form."""
    name, equals, value = text.partition("=")
    stage, _, key = name.partition(".")
    if stage not in ("align", "distill") or not key or not equals:
        raise ValueError(f"--set {text}: expected align.KEY=VALUE or distill.KEY=VALUE, with a value as in TOML")
    try:
        return stage, key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"--set {text}: not a TOML value ({error})") from error


def curve(result: TrainResult, name: str) -> list[list[float]]:
    """[tokens so far, mean of a metric] over windows of a run's steps."""
    window = -(-len(result.metrics) // CURVE_POINTS)
    points, tokens = [], 0
    for start in range(0, len(result.metrics), window):
        some = result.metrics[start : start + window]
        tokens += sum(int(record["tokens"]) for record in some)
        points.append([tokens, sum(record[name] for record in some) / len(some)])
    return points
