"""Evaluating any model on any problems: sample, score, record, summarise; resumable.

A model is a `generate` callable, so our engine, HF `generate`, vLLM and a remote server are judged alike. Scoring is
`m1.reasoning`'s, the statistics are in `metrics.py`; benchmarks, tables and plots are not here.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from m1.evaluation import metrics
from m1.reasoning.answers import ANSWER_INSTRUCTION
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer
from m1.reasoning.voting import group_answers

Prompt = str | list[dict[str, str]]  # a text, or chat messages with `role` and `content`
_FULL_REWARD = 1.0  # a sample is correct when its reward reaches this
_RECORDS_START = b'{"run":'


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion. `num_tokens` counts generated tokens, `finish_reason` is vLLM's ("stop", "length"), `mean_logprob`
    is the mean log-prob per generated token in nats, None where the backend gives none."""

    text: str
    num_tokens: int
    finish_reason: str
    mean_logprob: float | None = None


# generate(prompts, n, params) gives n samples for each prompt; `params` has vLLM's field names (temperature, max_tokens...).
Generate = Callable[[list[Prompt], int, Mapping[str, Any]], list[list[Sample]]]


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
    batch_size: int = 64,
    on_record: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Draw `num_samples` completions for each problem, score them, and return `summarize` of all records.

    `records_path` gets one JSON line about the run (with `description`: model, revision, whatever identifies it), then one
    line a problem as it is done. If the file exists and describes the same run, its problems are not sampled again, so a
    killed evaluation is continued by the same call. `generate` is called with `batch_size` problems at a time; a `seed` in
    `params` is raised by the position of the batch's first problem. `on_record(done, total)` is called after each problem.

    Raises ValueError for empty input, for records of another run (naming what differs) or of a run still being written, for
    malformed records, and for a `generate` that returns the wrong number of samples.
    """
    problems = list(problems)
    prompts = [to_prompt(problem) for problem in problems]
    _require_input(problems, num_samples, batch_size)
    run = {
        "num_problems": len(problems),
        "num_samples": num_samples,
        "params": dict(params),
        "description": dict(description or {}),
        "digest": _digest(problems, prompts),
    }
    with _open_records(Path(records_path), run) as (file, records), _scorer(scorer) as scorer:
        todo = [index for index, problem in enumerate(problems) if problem.id not in records]
        for start in range(0, len(todo), batch_size):
            batch = todo[start : start + batch_size]
            batch_params = dict(params, seed=params["seed"] + batch[0]) if params.get("seed") is not None else params
            samples = generate([prompts[index] for index in batch], num_samples, batch_params)
            _require_samples(samples, len(batch), num_samples)
            for index, record in zip(batch, _judge([problems[index] for index in batch], samples, scorer)):
                _append(file, record)
                records[problems[index].id] = record
                if on_record:
                    on_record(len(records), len(problems))
    return summarize([records[problem.id] for problem in problems])


def summarize(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of the records of one run, as plain JSON.

    `pass@1` with its `standard_error` and `sampling_error` (`metrics.MeanAccuracy`, None where undefined); `pass@k` and
    `maj@k` (exact, means over problems) for k = 1, 2, 4 ... n; `mean_tokens` a sample; the shares of samples cut off at the
    token limit (`truncation_rate`), without an answer (`no_answer_rate`), and whose score failed (`failed_score_rate`).
    """
    if not records:
        raise ValueError("there are no records to summarize")
    samples = [sample for record in records for sample in record["samples"]]
    correct = [[float(_is_correct(sample)) for sample in record["samples"]] for record in records]
    accuracy = metrics.mean_accuracy(correct)
    num_samples = min(len(record["samples"]) for record in records)
    return {
        "num_problems": len(records),
        "num_samples": num_samples,
        "pass@1": accuracy.mean,
        "pass@1_standard_error": _finite(accuracy.standard_error),
        "pass@1_sampling_error": _finite(accuracy.sampling_error),
        "pass@k": {
            str(k): float(np.mean([metrics.pass_at_k(len(one), int(sum(one)), k) for one in correct]))
            for k in _subset_sizes(num_samples)
        },
        "maj@k": {
            str(k): float(np.mean([_majority(record, k) for record in records]))
            for k in _subset_sizes(num_samples)
            if all(metrics.can_enumerate(len(record["samples"]), k) for record in records)
        },
        "mean_tokens": float(np.mean([sample["num_tokens"] for sample in samples])),
        "truncation_rate": float(np.mean([sample["finish_reason"] == "length" for sample in samples])),
        "no_answer_rate": float(np.mean([sample["answer"] is None for sample in samples])),
        "failed_score_rate": float(np.mean([sample["reason"] is not None for sample in samples])),
    }


def read_records(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The description of the run and the finished problems' records in a records file; a torn last line is left out.

    Raises ValueError naming the file and line for a malformed record or one that stands there twice.
    """
    content = Path(path).read_bytes()
    run: dict[str, Any] = {}
    records: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            if number == 1:
                run = record["run"]
                continue
            identity = record["id"]
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of an evaluation ({error!r})") from error
        if identity in records:
            raise ValueError(f"{path}, line {number}: the problem {identity!r} has a record already")
        records[identity] = record
    return run, list(records.values())


def _judge(problems: Sequence[Problem], samples: Sequence[Sequence[Sample]], scorer: Scorer) -> Iterator[dict[str, Any]]:
    """A record for each problem: the problem, its samples with answers and rewards, and which answers are the same."""
    repeated = [problem for problem, drawn in zip(problems, samples) for _ in drawn]
    scores = iter(scorer.score_many(repeated, [sample.text for drawn in samples for sample in drawn]))
    for problem, drawn in zip(problems, samples):
        scored = [asdict(sample) | asdict(next(scores)) for sample in drawn]
        labels = [-1] * len(scored)
        groups = group_answers([sample["answer"] for sample in scored], scorer.verifier.are_same)
        for label, indices in enumerate(groups):
            for index in indices:
                labels[index] = label
        yield {"id": problem.id, "problem": problem.problem, "answer": problem.answer, "labels": labels, "samples": scored}


def _majority(record: Mapping[str, Any], k: int) -> float:
    labels, samples = record["labels"], record["samples"]
    num_groups = max(labels) + 1
    is_correct = [_is_correct(samples[labels.index(label)]) for label in range(num_groups)]
    return metrics.majority_at_k([labels.count(label) for label in range(num_groups)], is_correct, labels.count(-1), k)


def _is_correct(sample: Mapping[str, Any]) -> bool:
    return sample["reward"] >= _FULL_REWARD


def _subset_sizes(num_samples: int) -> list[int]:
    return sorted({2**power for power in range(num_samples.bit_length())} | {num_samples})


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _digest(problems: Sequence[Problem], prompts: Sequence[Prompt]) -> str:
    """Fingerprint of what is asked and how it is judged."""
    content = json.dumps([[asdict(problem), prompt] for problem, prompt in zip(problems, prompts)], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


@contextmanager
def _open_records(path: Path, run: dict[str, Any]) -> Iterator[tuple[IO[bytes], dict[str, dict[str, Any]]]]:
    """The records file, locked and ready for appending, and the records it holds already, by problem id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another evaluation; wait for it or choose another path") from error
        found, records = read_records(path)
        content = path.read_bytes()
        if found:
            _require_same_run(path, found, json.loads(json.dumps(run)))
        elif not _RECORDS_START.startswith(content[: len(_RECORDS_START)]):
            raise ValueError(f"{path} exists and holds no records of an evaluation; choose another path")
        file.truncate(content.rfind(b"\n") + 1)  # a kill in the middle of a line leaves it torn
        if not found:
            _append(file, {"run": run})
        yield file, {record["id"]: record for record in records}


def _append(file: IO[bytes], record: Mapping[str, Any]) -> None:
    file.write(json.dumps(record).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _scorer(scorer: Scorer | None) -> Iterator[Scorer]:
    if scorer is not None:
        yield scorer
        return
    with Scorer() as own:
        yield own


def _require_same_run(path: Path, found: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    for key, value in run.items():
        if found.get(key) != value:
            what = "problems or prompts" if key == "digest" else key
            raise ValueError(
                f"{path} holds records of another run: {what} differ (there {found.get(key)}, now {value}); "
                "choose another path or remove the file"
            )


def _require_input(problems: Sequence[Problem], num_samples: int, batch_size: int) -> None:
    if not problems:
        raise ValueError("problems must hold at least one problem")
    if len({problem.id for problem in problems}) < len(problems):
        raise ValueError("problems must have unique ids")
    for name, value in (("num_samples", num_samples), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _require_samples(samples: Sequence[Sequence[Sample]], num_prompts: int, num_samples: int) -> None:
    counts = [len(drawn) for drawn in samples]
    if counts != [num_samples] * num_prompts:
        raise ValueError(f"generate must return {num_samples} samples for each of {num_prompts} prompts, got {counts}")
