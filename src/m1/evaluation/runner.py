"""Evaluating any model on any problems: sample, score, record, summarise; resumable.

A model is a `generate` callable (`sampling.py`), so our engine, HF `generate`, vLLM and a remote server are judged alike.
Scoring is `m1.reasoning`'s, the file is `records.py`'s, the numbers are `summary.py`'s; benchmarks are in `tasks.py`.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from m1.evaluation.budget import Budget, SampleUntil, accuracy_at_budgets, sample_until, vote_is_right
from m1.evaluation.metrics import mean_accuracy
from m1.evaluation.records import RecordFile, open_records
from m1.evaluation.sampling import Generate, Prompt, Sample, SampleRequest, Watch
from m1.evaluation.summary import VERIFIER_SCORE, sample_rates, summarize
from m1.evaluation.votes import Verify
from m1.reasoning.answers import ANSWER_INSTRUCTION, extract_answer
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.reasoning.voting import AdaptiveVote, group_answers


def boxed_prompt(problem: Problem) -> Prompt:
    """The M1 paper's prompt: one user message, the problem and the request for a boxed answer."""
    return [{"role": "user", "content": f"{problem.problem}\n{ANSWER_INSTRUCTION}"}]


def evaluate(
    problems: Sequence[Problem],
    generate: Generate,
    *,
    num_samples: int,
    params: Mapping[str, Any],
    records_path: str | Path,
    description: Mapping[str, Any] | None = None,
    to_prompt: Callable[[Problem], Prompt] = boxed_prompt,
    scorer: Scorer | None = None,
    verifier: Verify | None = None,
    batch_size: int | None = None,
    adaptive: float | None = None,
    budget: Budget | None = None,
    on_record: Callable[[int, int], None] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Sample, score and record every problem, and return the summary of all records (`summarize_run`).

    `records_path` gets one JSON line about the run (with `description`: model, whatever identifies it), then one line a
    problem as it is done; `.gz` compresses it. If the file exists and describes the same run, its problems are not sampled
    again, so a killed evaluation is continued by the same call.

    Each problem gets `num_samples` samples. With `adaptive`, sampling of a problem stops as soon as its vote is decided with
    that confidence (`AdaptiveVote`). With `budget`, each problem is sampled alone, with everything the backend has, until the
    budget is used up: only so do its recorded times mean anything. `generate` is given `batch_size` problems at once, all of
    them by default. A `seed` in `params` gives each problem a seed of its own, made of it and the problem's id, so what a
    problem draws depends neither on the others nor on an interruption. `verifier` scores every sample besides, for the votes
    weighted by it.

    `on_record(done, total)` is called after each problem, from a thread that judges while `generate` goes on;
    `on_step(samples, tokens)` after every step and sample, with what has been sampled since the call.

    Raises ValueError for empty input, for records of another run (naming what differs) or of a run still being written, for
    malformed records, and for a `generate` that gives the wrong number of samples.
    """
    problems = list(problems)
    prompts = [to_prompt(problem) for problem in problems]
    _require_input(problems, num_samples, batch_size, adaptive)
    run = {
        "num_problems": len(problems),
        "num_samples": num_samples,
        "params": dict(params),
        "adaptive": adaptive,
        "budget": asdict(budget) if budget else None,
        "description": dict(description or {}),
        "digest": _digest(problems, prompts),
    }
    if on_step:
        generate = _counting(generate, on_step)
    with open_records(Path(records_path), run) as file, _scorer(scorer) as scorer:
        todo = [index for index, problem in enumerate(problems) if problem.id not in file.records]
        with _Judge(file, scorer, verifier, len(problems), on_record) as judge:
            for start in range(0, len(todo), batch_size or max(1, len(todo))):
                batch = todo[start : start + (batch_size or len(todo))]
                chosen = [problems[index] for index in batch]
                requests = [SampleRequest(prompts[i], num_samples, _with_own_seed(params, problems[i])) for i in batch]
                if budget:
                    _sample_alone(chosen, requests, generate, budget, adaptive, judge)
                else:
                    _sample_together(chosen, requests, generate, adaptive, judge)
        return summarize_run(run, [file.records[problem.id] for problem in problems])


def summarize_run(
    run: Mapping[str, Any], records: Sequence[Mapping[str, Any]], *, seconds: Sequence[float] = (), tokens: Sequence[float] = ()
) -> dict[str, Any]:
    """The numbers of a run, as plain JSON: `summarize` where every problem has the same number of samples.

    A run that was stopped early has a `vote` (accuracy of the majority, with its standard error) and `mean_samples`
    instead: samples that finish before a deadline or a decision are no fair draw, so pass@1 and pass@k of them would be
    biased. A run under a budget also has `time_budgets` and `token_budgets`: `accuracy_at_budgets` for each of `seconds` and
    `tokens`, by default the whole budget.
    """
    budget = run.get("budget")
    if not budget and not run.get("adaptive"):
        return summarize(records)
    if not records:
        raise ValueError("there are no records to summarize")
    vote = mean_accuracy([[float(vote_is_right(record))] for record in records])
    summary: dict[str, Any] = {
        "num_problems": len(records),
        "vote": vote.mean,
        "vote_standard_error": vote.standard_error if np.isfinite(vote.standard_error) else None,
        "mean_samples": float(np.mean([len(record["samples"]) for record in records])),
        **sample_rates(records),
    }
    if budget:
        seconds = seconds or ([budget["seconds"]] if budget["seconds"] else [])
        tokens = tokens or ([budget["tokens"]] if budget["tokens"] else [])
        summary["time_budgets"] = accuracy_at_budgets(records, seconds, "seconds")
        summary["token_budgets"] = accuracy_at_budgets(records, tokens, "tokens")
    return summary


class _Judge:
    """Scores finished problems and writes their records in a thread of its own, so that the model needn't wait."""

    def __init__(
        self,
        file: RecordFile,
        scorer: Scorer,
        verifier: Verify | None,
        num_problems: int,
        on_record: Callable[[int, int], None] | None,
    ) -> None:
        self._file, self.scorer, self._verifier = file, scorer, verifier
        self._num_problems, self._on_record = num_problems, on_record
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="m1-judge")
        self._pending: deque[Future[None]] = deque()
        self._has_failed = False

    def __enter__(self) -> "_Judge":
        return self

    def __exit__(self, kind: type | None, *exception: object) -> None:
        self._thread.shutdown(wait=True)  # also after an interrupt: what was sampled whole is recorded
        if kind is None:
            self.finish()

    def take(self, problem: Problem, samples: Sequence[Sample], **facts: Any) -> None:
        """A problem is done. Raises what went wrong with an earlier one."""
        self._collect()
        self._pending.append(self._thread.submit(self._work, problem, list(samples), facts))

    def finish(self) -> None:
        """Wait until all that was taken is judged and written."""
        self._collect(wait=True)

    def _collect(self, *, wait: bool = False) -> None:
        while self._pending and (wait or self._pending[0].done()):
            self._pending.popleft().result()

    def _work(self, problem: Problem, samples: list[Sample], facts: dict[str, Any]) -> None:
        if self._has_failed:
            return
        try:
            self._file.append(_judge(problem, samples, self.scorer, self._verifier) | facts)
            if self._on_record:
                self._on_record(len(self._file.records), self._num_problems)
        except BaseException:
            self._has_failed = True
            raise


class _Together(Watch):
    """Hands each problem to the judge when its last sample has come, or its vote is decided."""

    def __init__(
        self, problems: Sequence[Problem], num_samples: int, adaptive: float | None, judge: _Judge, equal: Any
    ) -> None:
        self.problems, self.num_samples, self.judge = problems, num_samples, judge
        self.samples: list[list[Sample]] = [[] for _ in problems]
        self.unfinished = set(range(len(problems)))
        self.votes = [AdaptiveVote(num_samples, equal, adaptive) for _ in problems] if adaptive else []

    def on_sample(self, request: int, sample: Sample) -> bool:
        drawn = self.samples[request]
        drawn.append(sample)
        if self.votes:
            if self.votes[request].add(extract_answer(sample.text)):
                self._finish(request, drawn, ended_by=self.votes[request].reason)
                return True
        elif len(drawn) == self.num_samples:
            self._finish(request, sorted(drawn, key=lambda one: one.index))
        return False

    def _finish(self, request: int, samples: list[Sample], **facts: Any) -> None:
        self.unfinished.remove(request)
        self.samples[request] = []
        self.judge.take(self.problems[request], samples, **facts)


class _Counted(Watch):
    """Passes everything on to another watch, and says how much there has been."""

    def __init__(self, watch: Watch, on_step: Callable[[int, int], None], totals: list[int]) -> None:
        self._watch, self._on_step, self._totals = watch, on_step, totals
        self._tokens_before = totals[1]

    def on_sample(self, request: int, sample: Sample) -> bool:
        self._totals[0] += 1
        self._totals[1] = max(self._totals[1], self._tokens_before + (sample.tokens_spent or 0))
        self._on_step(self._totals[0], self._totals[1])
        return self._watch.on_sample(request, sample)

    def is_over(self, num_tokens: int) -> bool:
        self._totals[1] = self._tokens_before + num_tokens
        self._on_step(self._totals[0], self._totals[1])
        return self._watch.is_over(num_tokens)


def _counting(generate: Generate, on_step: Callable[[int, int], None]) -> Generate:
    totals = [0, 0]  # samples and tokens over all calls
    return lambda requests, watch: generate(requests, _Counted(watch, on_step, totals))


def _sample_together(
    problems: Sequence[Problem], requests: Sequence[SampleRequest], generate: Generate, adaptive: float | None, judge: _Judge
) -> None:
    watch = _Together(problems, requests[0].n, adaptive, judge, judge.scorer.verifier.are_same)
    generate(requests, watch)
    if watch.unfinished:
        counts = {problems[index].id: len(watch.samples[index]) for index in sorted(watch.unfinished)}
        raise ValueError(f"generate must give {requests[0].n} samples of each request, got {counts}")


def _sample_alone(
    problems: Sequence[Problem],
    requests: Sequence[SampleRequest],
    generate: Generate,
    budget: Budget,
    adaptive: float | None,
    judge: _Judge,
) -> None:
    equal = judge.scorer.verifier.are_same
    for problem, request in zip(problems, requests):
        watch = SampleUntil(budget, AdaptiveVote(request.n, equal, adaptive) if adaptive else None)
        samples = sample_until(generate, request, watch)
        judge.take(problem, samples, ended_by=watch.ended_by, seconds=watch.seconds, tokens=watch.num_tokens)
        judge.finish()  # judging takes processor time, which must not be the next problem's


def _judge(problem: Problem, samples: Sequence[Sample], scorer: Scorer, verifier: Verify | None) -> dict[str, Any]:
    """The record of a problem: its samples with answers, rewards and verifier's scores, and which answers are the same."""
    scores = scorer.score_many([problem] * len(samples), [sample.text for sample in samples])
    scored = [_rounded(asdict(sample)) | asdict(score) for sample, score in zip(samples, scores)]
    if verifier is not None:
        for sample in scored:
            sample[VERIFIER_SCORE] = float(verifier(problem.problem, sample["text"]))
    record = {"id": problem.id, "problem": problem.problem, "answer": problem.answer}
    if problem.reward != "math":
        record["reward"] = problem.reward
    return record | {"labels": label_answers(scored, scorer), "samples": scored}


def label_answers(samples: Sequence[Mapping[str, Any]], scorer: Scorer) -> list[int]:
    """The number of each sample's answer among the distinct ones; -1 for none."""
    labels = [-1] * len(samples)
    for label, indices in enumerate(group_answers([sample["answer"] for sample in samples], scorer.verifier.are_same)):
        for index in indices:
            labels[index] = label
    return labels


def _rounded(sample: dict[str, Any]) -> dict[str, Any]:
    """Without digits that say nothing and don't compress: a microsecond, a millionth of a nat."""
    return {key: round(value, 6) if isinstance(value, float) else value for key, value in sample.items()}


def _with_own_seed(params: Mapping[str, Any], problem: Problem) -> Mapping[str, Any]:
    if params.get("seed") is None:
        return params
    digest = hashlib.blake2b(f"{params['seed']}/{problem.id}".encode(), digest_size=4).digest()
    return {**params, "seed": int.from_bytes(digest, "little") >> 1}  # 31 bits: every server's seed holds them


def _digest(problems: Sequence[Problem], prompts: Sequence[Prompt]) -> str:
    """Fingerprint of what is asked and how it is judged."""
    content = json.dumps([[asdict(problem), prompt] for problem, prompt in zip(problems, prompts)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@contextmanager
def _scorer(scorer: Scorer | None) -> Iterator[Scorer]:
    if scorer is not None:
        yield scorer
        return
    with Scorer() as own:
        yield own


def _require_input(problems: Sequence[Problem], num_samples: int, batch_size: int | None, adaptive: float | None) -> None:
    if not problems:
        raise ValueError("problems must hold at least one problem")
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError("problems must have unique ids")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if adaptive is not None and not 0.5 < adaptive <= 1:
        raise ValueError(f"adaptive: expected a confidence above 0.5 and at most 1, got {adaptive}")
