"""`m1 solve`: sample a problem many times, group the answers by mathematical equality, let the majority decide.

The wiring only: sampling is the engine's, extraction and voting are reasoning's.
"""

import json
import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m1.config import SolveConfig, require
from m1.engine.llm import Engine
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Completion
from m1.modeling.loading import choose_device, inference_dtype, load_model, load_tokenizer
from m1.reasoning.answers import extract_answer
from m1.reasoning.verify import Verifier
from m1.reasoning.voting import Vote, majority_vote


def run(config: SolveConfig) -> None:
    """The command: prints the samples' answers, the vote and one winning solution, or one JSON object with --json."""
    require(config, "model", "problem")
    problem = sys.stdin.read() if config.problem == "-" else config.problem
    if not problem.strip():
        raise ValueError("the problem is empty; give it in quotes after `m1 solve`, or - and standard input")
    if config.samples < 1:
        raise ValueError(f"--samples: expected at least 1, got {config.samples}")
    device = choose_device(config.device)
    console = Console(stderr=True)
    model, tokenizer = load_model(config.model, dtype=inference_dtype(device), device=device), load_tokenizer(config.model)
    console.print(
        f"[bold]{escape(config.model)}[/]: {len(model.config.mixer_layers)} mixer and {len(model.config.attention_layers)} "
        f"attention layers on {device}; {config.samples} samples of at most {config.max_new_tokens} tokens"
    )
    engine = Engine(model, tokenizer)
    params = SamplingParams(
        n=config.samples,
        temperature=config.temperature,
        top_p=config.top_p,
        max_tokens=config.max_new_tokens,
        seed=config.seed,
    )
    text = problem.rstrip() + config.suffix
    prompt: Any = [{"role": "user", "content": text}] if tokenizer.chat_template else text
    start = time.perf_counter()
    [samples] = engine.generate([prompt], params, progress=True)
    seconds = time.perf_counter() - start
    answers = [extract_answer(sample.text) for sample in samples]
    with Verifier() as verifier:
        vote = majority_vote(answers, verifier.are_same)
    report = print_json if config.json else print_text
    report(samples, answers, vote, seconds)


def print_json(samples: list[Completion], answers: list[str | None], vote: Vote, seconds: float) -> None:
    """One object: the winning answer, its share of the samples, all groups, and every sample."""
    result = {
        "answer": vote.answer,
        "share": vote.share,
        "votes": [{"answer": group.answer, "samples": list(group.indices)} for group in vote.groups],
        "solution": samples[vote.winner_index].text if vote.winner_index is not None else None,
        "samples": [
            {"answer": answer, "finish_reason": sample.finish_reason, "tokens": len(sample.token_ids), "text": sample.text}
            for sample, answer in zip(samples, answers, strict=True)
        ],
        "tokens": sum(len(sample.token_ids) for sample in samples),
        "seconds": round(seconds, 3),
    }
    print(json.dumps(result, ensure_ascii=False))


def print_text(samples: list[Completion], answers: list[str | None], vote: Vote, seconds: float) -> None:
    """A table of answers with their votes, then the solution that stands for the winner."""
    console = Console()
    table = Table("answer", "votes", "samples", title="The vote", title_justify="left")
    for group in vote.groups:
        table.add_row(
            escape(group.answer), "█" * max(1, round(30 * len(group.indices) / len(samples))), str(len(group.indices))
        )
    silent = answers.count(None)
    if silent:
        table.add_row("[dim]no answer[/]", "", str(silent))
    console.print(table)
    if vote.winner_index is not None:
        console.rule("[bold]A solution with the winning answer" if vote.answer is not None else "[bold]A sample")
        console.print(escape(samples[vote.winner_index].text.strip()))
        console.rule()
    tokens = sum(len(sample.token_ids) for sample in samples)
    cut = sum(sample.finish_reason == "length" for sample in samples)
    console.print(
        f"answer [bold]{escape(vote.answer) if vote.answer is not None else 'none'}[/], {vote.share:.0%} of the votes; "
        f"{len(samples)} samples, {tokens} tokens in {seconds:.1f} s" + (f"; {cut} cut at the token limit" if cut else "")
    )
