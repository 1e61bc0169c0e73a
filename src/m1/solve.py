"""`m1 solve`: sample a problem many times, group the answers by mathematical equality, vote; within a budget if one is set.

The wiring only: sampling is a backend's, extraction and grouping are reasoning's, budgets and ways to vote evaluation's.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from m1.backends import open_backend, other_ranks_serving
from m1.config import SolveConfig, require, require_possible
from m1.distributed import ranks
from m1.evaluation.budget import Budget, SampleUntil, sample_until
from m1.evaluation.sampling import Generate, Prompt, Sample, SampleRequest
from m1.evaluation.votes import elect, load_verifier, require_vote
from m1.reasoning.answers import extract_answer
from m1.reasoning.verify import Verifier
from m1.reasoning.voting import AdaptiveVote, Vote

DEFAULT_SAMPLES = 16
MOST_SAMPLES = 1_000_000  # where only a budget limits them
_WARM_UP_TOKENS = 8
_RANK_TIMEOUT = 600.0  # seconds that ranks wait for each other at the beginning and the end
_ENDINGS = {"seconds": "the time was up", "tokens": "the tokens were used up", "samples": "", "complete": ""}


@dataclass(frozen=True)
class Solution:
    """What came out: the finished samples and their answers, the vote, and what it took."""

    problem: str
    samples: list[Sample]
    answers: list[str | None]
    vote: Vote
    seconds: float
    tokens: int  # generated, those of unfinished samples included
    ended_by: str


def run(config: SolveConfig) -> None:
    """The command: prints the samples' answers, the vote and one winning solution, or one JSON object with --json.

    Under `torchrun` the engines of all ranks draw the samples; the first rank votes and prints.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        _run(config)
        return
    if config.backend != "engine" or config.url:
        raise ValueError("torchrun: only --backend engine uses several ranks")
    serving = other_ranks_serving(config, has_deadline=bool(config.seconds))
    with ranks(config.device, _RANK_TIMEOUT), serving as is_first:
        if is_first:
            _run(config)


def _run(config: SolveConfig) -> None:
    require(config, "model", "problem")
    problem = sys.stdin.read() if config.problem == "-" else config.problem
    if not problem.strip():
        raise ValueError("the problem is empty; give it in quotes after `m1 solve`, or - and standard input")
    check(config)
    budget = Budget(config.seconds or None, config.tokens or None)
    verifier = load_verifier(config.vote)
    text = problem.rstrip() + config.suffix
    backend = open_backend(config, [text], has_deadline=budget.seconds is not None)
    num_samples = config.samples or (MOST_SAMPLES if budget else DEFAULT_SAMPLES)
    limits = [f"{num_samples} samples"] if config.samples or not budget else []
    limits += [f"{config.seconds:g} s"] * bool(config.seconds) + [f"{config.tokens} tokens"] * bool(config.tokens)
    Console(stderr=True).print(
        f"[bold]{escape(backend.description)}[/]; until {' or '.join(limits)}, each of at most {config.max_new_tokens} tokens"
    )
    prompt = backend.prompt(text)
    if budget.seconds:
        backend.warm_up(prompt, _WARM_UP_TOKENS, config.temperature)
    solution = solve(
        problem, prompt, backend.generate, config, num_samples=num_samples, budget=budget, verifier=verifier, progress=True
    )
    (print_json if config.json else print_text)(solution)


def check(config: SolveConfig) -> None:
    """Raise ValueError for options that are out of range or contradict each other."""
    if config.samples < 0:
        raise ValueError(f"--samples: expected at least 1, got {config.samples}")
    if config.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens: expected at least 1, got {config.max_new_tokens}")
    require_possible(config)
    require_vote(config.vote)
    if config.adaptive and config.vote != "majority":
        raise ValueError(f"--adaptive: only a majority vote can be decided early, and --vote is {config.vote}; leave out one")
    if config.adaptive and not 0.5 < config.adaptive <= 1:
        raise ValueError(f"--adaptive: expected a probability above 0.5 and at most 1, got {config.adaptive}")


def solve(
    problem: str,
    prompt: Prompt,
    generate: Generate,
    config: SolveConfig,
    *,
    num_samples: int,
    budget: Budget | None = None,
    verifier: Callable[[str, str], float] | None = None,
    progress: bool = False,
) -> Solution:
    """Sample `prompt` until `num_samples`, the budget or the vote says stop, and vote as `config` says.

    Under a budget or an adaptive vote, samples vote in the order in which they finished; else in order of their index. The
    first decides ties. Voting itself is not part of the budget.
    """
    params: dict[str, Any] = {"temperature": config.temperature, "top_p": config.top_p, "max_tokens": config.max_new_tokens}
    with Verifier() as equality, tqdm(total=None if budget else num_samples, unit="sample", disable=not progress) as bar:
        adaptive = AdaptiveVote(num_samples, equality.are_same, config.adaptive) if config.adaptive else None
        watch = SampleUntil(budget, adaptive, on_progress=lambda watch: _show(bar, watch))
        request = SampleRequest(prompt, num_samples, {**params, "seed": config.seed})
        samples = sample_until(generate, request, watch)
        seconds = watch.seconds
        if not budget and adaptive is None:
            samples = sorted(samples, key=lambda sample: sample.index)
        answers = [extract_answer(sample.text) for sample in samples]
        vote = elect(samples, answers, equality.are_same, method=config.vote, problem=problem, verifier=verifier)
    tokens = max(watch.num_tokens, sum(sample.num_tokens for sample in samples))
    return Solution(problem, samples, answers, vote, seconds, tokens, watch.ended_by)


def _show(bar: tqdm, watch: SampleUntil) -> None:
    bar.n = len(watch.samples)
    bar.set_postfix_str(f"{watch.num_tokens / max(watch.seconds, 1e-9):,.0f} tokens/s", refresh=False)
    bar.update(0)


def print_json(solution: Solution) -> None:
    """One object: the winning answer, its share of the votes, all groups, every sample, and what was used."""
    samples, vote = solution.samples, solution.vote
    result = {
        "answer": vote.answer,
        "share": vote.share,
        "votes": [{"answer": group.answer, "samples": list(group.indices), "weight": group.weight} for group in vote.groups],
        "solution": samples[vote.winner_index].text if vote.winner_index is not None else None,
        "samples": [
            {
                "answer": answer,
                "finish_reason": sample.finish_reason,
                "tokens": sample.num_tokens,
                "seconds": sample.seconds,
                "mean_logprob": sample.mean_logprob,
                "text": sample.text,
            }
            for sample, answer in zip(samples, solution.answers, strict=True)
        ],
        "tokens": solution.tokens,
        "seconds": round(solution.seconds, 3),
        "ended_by": solution.ended_by,
    }
    print(json.dumps(result, ensure_ascii=False))


def print_text(solution: Solution) -> None:
    """A table of answers with their votes, then the solution that stands for the winner, then what was used."""
    samples, vote = solution.samples, solution.vote
    console = Console()
    table = Table("answer", "votes", "samples", title="The vote", title_justify="left")
    total = sum(group.weight for group in vote.groups) or 1.0
    for group in vote.groups:
        bar = "█" * max(1, round(30 * group.weight / total))
        table.add_row(_shown(group.answer), bar, str(len(group.indices)))
    silent = solution.answers.count(None)
    if silent:
        table.add_row("[dim]no answer[/]", "", str(silent))
    console.print(table)
    if not samples:
        console.print("No sample finished: allow more, or fewer at once (--concurrency), or shorter ones (--max-new-tokens)")
    if vote.winner_index is not None:
        console.rule("[bold]A solution with the winning answer" if vote.answer is not None else "[bold]A sample")
        console.print(_shown(samples[vote.winner_index].text.strip()))
        console.rule()
    cut = sum(sample.finish_reason == "length" for sample in samples)
    unfinished = solution.tokens - sum(sample.num_tokens for sample in samples)
    ending = _ENDINGS.get(solution.ended_by, f"the vote was decided: {solution.ended_by}")
    facts = [
        f"{len(samples)} samples, {solution.tokens} tokens in {solution.seconds:.1f} s",
        *([f"{cut} cut at the token limit"] if cut else []),
        *([f"{unfinished} tokens in samples that had not finished"] if unfinished > 0 else []),
        *([ending] if ending else []),
    ]
    answer = _shown(vote.answer) if vote.answer is not None else "none"
    console.print(f"answer [bold]{answer}[/], {vote.share:.0%} of the votes; {'; '.join(facts)}")


def _shown(text: str) -> str:
    """What a model wrote, so that it can neither style nor steer the terminal."""
    return escape("".join(char if char in "\n\t" or char.isprintable() else "�" for char in text))
