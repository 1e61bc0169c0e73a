"""`m1 quickstart`: convert, align, distil, fine-tune, reinforce, vote; measured before and after each stage.

The order of things and what is measured when; the numbers are in recipe.py, the page in page.py.
"""

import copy
import dataclasses
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from m1.backends import engine_backend
from m1.config import QuickstartConfig
from m1.conversion.convert import convert, import_base
from m1.engine.llm import Engine
from m1.engine.sampling_params import SamplingParams
from m1.evaluation.records import read_records
from m1.evaluation.runner import evaluate
from m1.modeling import M1ForCausalLM
from m1.modeling.loading import choose_device, inference_dtype, load_model, load_tokenizer
from m1.quickstart.findings import Findings, accuracy_line, describe_device, summary_table, without_directory
from m1.quickstart.page import write_page
from m1.quickstart.problems import answers_of, draw_problems, solutions_to, to_prompt
from m1.quickstart.recipe import Recipe, middle_layers, recipe_for
from m1.reasoning.problems import write_problems
from m1.reasoning.verify import Verifier
from m1.reasoning.voting import majority_vote
from m1.storage import GIB, git_revision, new_directory, require_disk, require_memory, write_json, write_run_record
from m1.training.align import align
from m1.training.distill import compare, distill
from m1.training.grpo import grpo
from m1.training.loop import TrainResult
from m1.training.packing import Document
from m1.training.sft import sft

NEEDED_MEMORY = 8 * GIB
NEEDED_DISK = 2 * GIB
WRITTEN = {"base", "records", "transformer", "hybrid", "results.json", "heldout.jsonl", "report.html"}  # in `out`


def run(config: QuickstartConfig) -> None:
    """The command. Raises FileExistsError if `out` holds a finished quickstart, or anything else, unless told to overwrite."""
    out = Path(config.out)
    if (out / "report.html").exists() and not config.overwrite:
        raise FileExistsError(
            f"{out / 'report.html'} is there already: open it, or start anew with --overwrite or another --out"
        )
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; give another --out")
    others = {path.name for path in out.glob("[!.]*")} - WRITTEN
    if others and not config.overwrite:
        raise FileExistsError(f"{out} holds what no quickstart wrote, such as {min(others)}; give another --out")
    require_memory(NEEDED_MEMORY, "m1 quickstart")
    require_disk(out, NEEDED_DISK, "m1 quickstart")
    Quickstart(config, out).run()


class Quickstart:
    """One run: its models, its problems, its findings."""

    def __init__(self, config: QuickstartConfig, out: Path, recipe: Recipe | None = None) -> None:
        self.config, self.out, self.console = config, out, Console()
        self.device = choose_device(config.device)
        self.dtype = inference_dtype(self.device)
        precision = "bfloat16" if self.dtype == torch.bfloat16 else "float32"
        self.recipe = recipe or recipe_for(self.device.type, precision, config.seed)
        self.findings = Findings()
        self.start = time.perf_counter()

    def run(self) -> None:
        torch.manual_seed(self.config.seed)
        transformer = self.prepare()
        self.teach(transformer)
        hybrid = self.make_hybrid()
        for name, model in (("Transformer", transformer), ("hybrid", hybrid)):
            self.fine_tune(name, model)
        self.show_vote()
        for name, model in (("transformer", transformer), ("hybrid", hybrid)):
            self.save(model, name)
        self.finish()

    # The stages

    def prepare(self) -> M1ForCausalLM:
        """The base model, in fp32 for training, and the problems."""
        with self.stage("load the Transformer and draw problems"):
            for name in ("base", "records"):
                shutil.rmtree(self.out / name, ignore_errors=True)
            import_base(self.config.base, self.out / "base")
            self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.out / "base", needs_chat_template=True)
            self.train_problems, self.heldout = draw_problems(self.recipe, self.config.seed)
            self.solutions = solutions_to(self.train_problems, self.tokenizer)
            self.say(f"a problem: {self.heldout[0].problem!r}, answer {self.heldout[0].answer}")
        return load_model(self.out / "base", dtype=torch.float32, device=self.device)

    def teach(self, transformer: M1ForCausalLM) -> None:
        """Make the Transformer one that half masters the problems: the teacher. Then let it answer, to learn from."""
        recipe, seed = self.recipe, self.config.seed
        with self.stage("teach the Transformer the problems (SFT)"):
            self.keep_curve("teach the Transformer", sft(transformer, self.solutions, recipe.teach))
        teacher: Any = copy.deepcopy(transformer)
        self.teacher: M1ForCausalLM = teacher.to(self.dtype).requires_grad_(False).eval()
        self.measure_accuracy("Transformer", "before SFT", self.teacher)
        with self.stage("let it answer, for the hybrid to learn from"):
            params = SamplingParams(temperature=1.0, max_tokens=recipe.max_new_tokens, seed=seed)
            problems = self.train_problems[: recipe.num_teacher_problems]
            with self.sampler(self.teacher) as engine:
                # Mixers learn from every token, problems included; what is compared on held-out text is the answers alone.
                self.documents: list[Document] = answers_of(engine, problems, self.tokenizer, params, "all")
                self.heldout_documents: list[Document] = answers_of(engine, self.heldout, self.tokenizer, params, "completion")

    def make_hybrid(self) -> M1ForCausalLM:
        """Convert, align and distil, with KL and agreement to the teacher after each."""
        recipe = self.recipe
        kept = middle_layers(self.teacher.config.num_hidden_layers)
        with self.stage("convert"):
            hybrid = convert(
                self.teacher,
                attention_layers=kept,
                mixer=recipe.mixer,
                start="improved",
                calibration=[document.token_ids.tolist() for document in self.documents[:32]],
                seed=self.config.seed,
            ).float()
            self.say(f"{len(hybrid.config.mixer_layers)} of {hybrid.config.num_hidden_layers} layers are {recipe.mixer} now")
        self.findings.setting |= {"attention_layers": kept, "mixer": recipe.mixer, "layers": hybrid.config.num_hidden_layers}
        self.measure_similarity("converted", hybrid)
        with self.stage("align"):
            self.keep_curve("align", align(hybrid, self.teacher, self.documents, recipe.align))
        self.measure_similarity("aligned", hybrid)
        with self.stage("distil"):
            self.keep_curve("distil", distill(hybrid, self.teacher, self.documents, recipe.distill))
        self.measure_similarity("distilled", hybrid)
        self.measure_accuracy("hybrid", "before SFT", hybrid)
        return hybrid

    def fine_tune(self, name: str, model: M1ForCausalLM) -> None:
        """SFT and GRPO, the same for both models."""
        with self.stage(f"fine-tune the {name} (SFT)"):
            self.keep_curve(f"SFT, {name}", sft(model, self.solutions, self.recipe.sft))
        self.measure_after("SFT", name, model)
        with self.stage(f"reinforce the {name} (GRPO)"):
            self.keep_curve(f"GRPO, {name}", grpo(model, self.tokenizer, self.train_problems, self.recipe.grpo))
        self.measure_after("GRPO", name, model)

    def measure_after(self, stage: str, name: str, model: M1ForCausalLM) -> None:
        if name == "hybrid":
            self.measure_similarity(stage, model)
        self.measure_accuracy(name, stage, model)

    def show_vote(self) -> None:
        """One held-out problem, looked at closely: the hybrid's answers and what the vote made of them.

        The problem is the one on which the samples disagree most while the vote is right, if there is any.
        """
        _, records = read_records(self.records_path("hybrid", "GRPO"))
        with Verifier() as verifier:
            votes = [majority_vote([sample["answer"] for sample in record["samples"]], verifier.are_same) for record in records]
            is_right = [verifier.check(record["answer"], vote.answer) for record, vote in zip(records, votes, strict=True)]
        order = sorted(range(len(records)), key=lambda i: (not is_right[i], votes[i].share))
        chosen, vote = records[order[0]], votes[order[0]]
        problem = next(problem for problem in self.heldout if problem.id == chosen["id"])
        self.findings.vote = {
            "problem": problem.problem,
            "gold": problem.answer,
            "answers": [sample["answer"] for sample in chosen["samples"]],
            "winner": vote.answer,
            "share": vote.share,
            "is_right": is_right[order[0]],
            "solution": chosen["samples"][vote.winner_index or 0]["text"],
        }
        answers = ", ".join(str(answer) for answer in self.findings.vote["answers"])
        self.say(f"a vote of the hybrid: {problem.problem!r}: {answers} -> {vote.answer} (right is {problem.answer})")

    # Measuring, and saying so

    def measure_similarity(self, stage: str, hybrid: M1ForCausalLM) -> None:
        found = compare(hybrid, self.teacher, self.heldout_documents, precision=self.recipe.distill.precision)
        self.findings.similarity[stage] = found
        self.say(f"held-out tokens: KL to the teacher {found['kl']:.3f}, same next token {found['agreement']:.1%}")

    def measure_accuracy(self, name: str, stage: str, model: M1ForCausalLM) -> None:
        recipe = self.recipe
        params = {"temperature": recipe.temperature, "max_tokens": recipe.max_new_tokens, "seed": self.config.seed}
        path = self.records_path(name, stage)
        path.parent.mkdir(parents=True, exist_ok=True)
        with self.sampler(model) as engine:
            summary = evaluate(
                self.heldout,
                engine_backend(engine),
                num_samples=recipe.num_samples,
                params=params,
                records_path=path,
                to_prompt=to_prompt,
            )
            summary["tokens_per_second"] = engine.metrics.tokens_per_second
        self.findings.accuracy.setdefault(name, {})[stage] = summary
        self.say(accuracy_line(name, stage, summary))

    @contextmanager
    def sampler(self, model: M1ForCausalLM) -> Iterator[Engine]:
        """An engine for a while: it leaves memory to the models and their training, and gives back its own at the end."""
        with Engine(model.eval(), self.tokenizer, dtype=self.dtype, memory_fraction=0.1) as engine:
            yield engine

    def records_path(self, name: str, stage: str) -> Path:
        return self.out / "records" / f"{name}-{stage}.jsonl"

    def keep_curve(self, stage: str, result: TrainResult) -> None:
        self.findings.curves[stage] = result.metrics

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        began = time.perf_counter()
        self.console.print(f"[bold]{title}[/]  [dim]({began - self.start:.0f} s)[/]")
        yield
        self.findings.seconds[title] = round(time.perf_counter() - began, 2)

    def say(self, line: str) -> None:
        self.console.print(f"  {line}", highlight=False, markup=False)

    # The end

    def save(self, model: M1ForCausalLM, name: str) -> None:
        """Write a model as a checkpoint directory, in bfloat16."""
        with new_directory(self.out / name, overwrite=True) as path:
            model.bfloat16().save_pretrained(path)
            self.tokenizer.save_pretrained(path)
            write_run_record(path, "quickstart", dataclasses.asdict(self.config), recipe=dataclasses.asdict(self.recipe))

    def finish(self) -> None:
        """results.json, report.html, heldout.jsonl, and what to do next."""
        found = self.findings
        found.setting |= {
            "command": shlex.join(["m1", *map(without_directory, sys.argv[1:])]),
            "base": without_directory(self.config.base),
            "device": describe_device(self.device),
            "precision": str(self.dtype).removeprefix("torch."),
            "seconds": round(time.perf_counter() - self.start, 1),
            "recipe": dataclasses.asdict(self.recipe),
            "revision": git_revision(),
        }
        write_json(self.out / "results.json", dataclasses.asdict(found))
        write_problems(self.out / "heldout.jsonl", self.heldout)
        write_page(found, self.out / "report.html")
        self.console.print(summary_table(found))
        self.console.print(f"[bold]Done in {found.setting['seconds']:.0f} s.[/] The report: {self.out / 'report.html'}")
        solve = f"m1 solve {self.heldout[0].problem!r} --model {self.out / 'hybrid'}"
        shared = f"--suffix '' --max-new-tokens {self.recipe.max_new_tokens}"
        self.say(f"Next: {solve} {shared}")
        self.say(f"or:   m1 eval {self.out / 'hybrid'} --tasks {self.out / 'heldout.jsonl'} --samples 16 {shared}")
