"""`m1 sample`: completions of many problems, checked and written as data for training.

Problems come from files, reasoning-gym, or the model itself, which writes a user's turn when it is given nothing but the
beginning of one (arXiv 2406.08464). The wiring only: the engine samples, m1.reasoning checks, json_lines.py writes. Started by
torchrun, each process takes its share of the problems and writes a file of its own; what they write: sample_directory.py; what
the model invents: inventions.py.
"""

import hashlib
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from m1.config import SampleConfig, require, require_possible
from m1.distributed import local_device
from m1.engine.llm import Engine
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Completion, Request
from m1.inventions import Inventions
from m1.json_lines import BlockWriter
from m1.modeling.loading import inference_dtype, load_config, load_tokenizer
from m1.reasoning.answers import extract_answer
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Score, Scorer
from m1.sample_directory import SampleDirectory
from m1.training.data import prompt_ids, user_prefix
from m1.training.sources import read_problem_set

FULL_MARKS = 1.0
INVENTED_TOKENS = 512  # longest problem that the model may invent
BLOCK_PROBLEMS, BLOCK_SECONDS = 64, 60.0  # a kill loses at most so much


@dataclass(frozen=True)
class Job:
    """One problem, and which of its samples are still to be drawn: `count` of them from number `first` on.

    invents: there is no problem yet, its text is what is drawn; the prompt is the beginning of a user's turn.
    """

    problem: Problem
    text: str
    prompt: list[int]
    first: int = 0
    count: int = 1
    invents: bool = False


class Work:
    """What a process has to draw. An invented problem is answered as soon as there is room, before others are invented.

    done: samples that are there already, by problem id. num_samples: how many were missing at first, if all inventions
    succeed.
    """

    def __init__(
        self,
        problems: list[Problem],
        inventions: Inventions,
        tokenizer: PreTrainedTokenizerBase,
        config: SampleConfig,
        done: dict[str, int],
    ) -> None:
        self.inventions, self._tokenizer, self._config = inventions, tokenizer, config
        self.jobs = deque(job for one in problems + inventions.problems for job in self._answers(one, done.get(one.id, 0)))
        self.num_samples = sum(job.count for job in self.jobs) + config.samples * len(inventions.missing)
        if inventions.missing:
            beginning = tokenizer(user_prefix(tokenizer, config.invent_system), add_special_tokens=False)["input_ids"]
            self.jobs.extend(Job(Problem(id_, "", ""), "", beginning, invents=True) for id_ in inventions.missing)

    def _answers(self, problem: Problem, first: int) -> list[Job]:
        if first >= self._config.samples:
            return []
        text = problem.problem + (self._config.suffix if problem.answer else "")  # who asks of his own asks as he likes
        return [Job(problem, text, prompt_ids(self._tokenizer, text), first, self._config.samples - first)]

    def invent(self, job: Job, completion: Completion) -> bool:
        """Take in what came of an invention; whether it is a problem, which is then to be answered."""
        problem = self.inventions.add(job.problem.id, completion)
        if problem is not None:
            self.jobs.extendleft(self._answers(problem, 0))
        return problem is not None


@dataclass
class Tally:
    """What a process has drawn since it started."""

    samples: int = 0
    tokens: int = 0
    checked: int = 0
    correct: int = 0
    failed: int = 0


def run(config: SampleConfig) -> None:
    """The command. Nothing is written before the input is found good; run again, it draws what is missing."""
    require(config, "model", "out")
    _check_numbers(config)
    rank, num_ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    directory = SampleDirectory(config)
    tokenizer = load_tokenizer(config.model, needs_chat_template=bool(config.invent))
    problems = _read_problems(config)
    ids = [problem.id for problem in problems]
    missing = directory.num_missing(ids)
    if directory.is_finished and not missing:
        print(f"{config.out} is finished already. Next: m1 sft or m1 distill with --data {config.out}")
        return
    directory.require_disk(missing)
    engine = _load_engine(config, tokenizer, problems)
    if rank == 0:
        print(f"m1 sample: {len(problems):,} problems and {config.invent:,} that {config.model} invents itself")
        print(f"  {config.samples} samples of at most {config.max_new_tokens:,} tokens each, on {engine.model.device}")
        print(f"  {missing:,} samples are missing in {config.out}; Ctrl-C and the same command go on later", flush=True)
    directory.create()
    start = time.perf_counter()
    with (
        Scorer() as scorer,
        Inventions(directory, rank, num_ranks) as inventions,
        directory.writer("samples", rank) as writer,
    ):
        work = Work(problems[rank::num_ranks], inventions, tokenizer, config, directory.counts())
        tally = _sample(engine, work, scorer, config, writer)
    seconds = time.perf_counter() - start
    if not directory.num_missing(ids):  # the last process to end finds it so
        directory.finish(seconds=round(seconds, 1))
    _conclude(config, tally, seconds)


def _check_numbers(config: SampleConfig) -> None:
    for name in ("samples", "max_new_tokens", "num_problems"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(config, name)}")
    if config.invent < 0:
        raise ValueError(f"--invent: expected 0 or more, got {config.invent}")
    require_possible(config)
    if config.temperature == 0 and (config.samples > 1 or config.invent):
        raise ValueError(f"--temperature: expected more than 0, so that samples differ, got {config.temperature}")
    if not config.data and not config.invent:
        raise ValueError("--data or --invent is needed: problem sets, or a number of problems that the model invents")


def _read_problems(config: SampleConfig) -> list[Problem]:
    if not config.data:
        return []
    problems = read_problem_set(config.data, num_problems=config.num_problems, seed=config.seed, reward=config.reward)
    seen: set[str] = set()
    for problem in problems:
        if problem.id in seen:
            raise ValueError(f"data: the id {problem.id!r} stands for two problems; samples are told apart by it")
        seen.add(problem.id)
    return problems


def _load_engine(config: SampleConfig, tokenizer: PreTrainedTokenizerBase, problems: list[Problem]) -> Engine:
    device = local_device(config.device)
    if device.index is not None:  # one GPU of several: where kernels are launched
        torch.cuda.set_device(device)
    longest = max((len(prompt_ids(tokenizer, problem.problem + config.suffix)) for problem in problems), default=0)
    longest = max(longest, 2 * INVENTED_TOKENS if config.invent else 0)
    limit = load_config(config.model).max_position_embeddings
    if longest >= limit:
        raise ValueError(f"data: a prompt of {longest} tokens leaves no room in the model's {limit}; remove such problems")
    room = min(limit, longest + config.max_new_tokens)
    # From the path, not from a loaded model: weights of its own are those that the engine lays out for sampling.
    return Engine(config.model, tokenizer, dtype=inference_dtype(device), device=device, max_model_len=room)


def _sample(engine: Engine, work: Work, scorer: Scorer, config: SampleConfig, writer: BlockWriter) -> Tally:
    """Draw, check and write what there is to do; a block is checked and written while the next one is drawn."""
    tally, block_began = Tally(), time.perf_counter()
    finished: list[tuple[Job, list[Completion]]] = []
    written: Future[None] = Future()
    written.set_result(None)

    def write(block: list[tuple[Job, list[Completion]]]) -> None:
        writer.append(_judge(block, scorer, config, tally))

    with (
        ThreadPoolExecutor(1) as background,  # its end waits for the block that is being written
        tqdm(total=work.num_samples, desc="sample", unit="sample", disable=None) as bar,
    ):
        try:
            for job, completions in _complete(engine, work.jobs, config):
                if job.invents:
                    if not work.invent(job, completions[0]):
                        bar.total -= config.samples
                    continue
                finished.append((job, completions))
                bar.update(job.count)
                if len(finished) == BLOCK_PROBLEMS or time.perf_counter() - block_began > BLOCK_SECONDS:
                    written.result()  # one block at a time; a full disk is raised here
                    share, speed = tally.correct / max(1, tally.checked), engine.metrics.tokens_per_second
                    bar.set_postfix_str(f"{share:.1%} correct, {speed:,.0f} tokens/s", refresh=False)
                    work.inventions.write()
                    written = background.submit(write, finished)
                    finished, block_began = [], time.perf_counter()
        except KeyboardInterrupt:
            written.result()
            work.inventions.write()
            write(finished)
            raise
        written.result()
        work.inventions.write()
        write(finished)
    return tally


def _complete(engine: Engine, jobs: deque[Job], config: SampleConfig) -> Iterator[tuple[Job, list[Completion]]]:
    """Each job with its completions as it finishes, those added meanwhile too; the engine is always given enough to be full."""
    running: dict[int, tuple[Job, Request]] = {}  # by the request's number in the engine
    num_running = 0  # samples of theirs
    try:
        while True:
            while num_running < 2 * engine.capacity.max_num_seqs and jobs:
                job = jobs.popleft()
                params = SamplingParams(
                    n=job.count,
                    temperature=config.temperature,
                    top_p=config.top_p,
                    max_tokens=INVENTED_TOKENS if job.invents else config.max_new_tokens,
                    seed=_seed(config.seed, job),
                )
                request = engine.submit(job.prompt, params)
                running[request.number] = job, request
                num_running += job.count
            if not running:
                return
            for request, _ in engine.step():
                if request.error is not None:
                    raise request.error
                if request.is_finished and request.number in running:
                    job, _ = running.pop(request.number)
                    num_running -= job.count
                    yield job, [request.completions[index] for index in range(job.count)]
    finally:
        for _, request in running.values():
            engine.abort(request)


def _seed(seed: int, job: Job) -> int:
    """Of a job: the same whenever and wherever it is drawn."""
    text = f"{seed}/{job.problem.id}/{job.first}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _judge(
    finished: list[tuple[Job, list[Completion]]], scorer: Scorer, config: SampleConfig, tally: Tally
) -> list[dict[str, Any]]:
    """Rows of finished jobs. is_correct is null where there is no reference answer, or the reward could not be computed."""
    samples = [(job, completion) for job, completions in finished for completion in completions]
    checkable = [(job.problem, completion.text) for job, completion in samples if job.problem.answer]
    scores = iter(scorer.score_many([problem for problem, _ in checkable], [text for _, text in checkable]))
    rows = []
    for job, completion in samples:
        score = next(scores) if job.problem.answer else Score(0.0, extract_answer(completion.text), "no reference answer")
        is_correct = None if score.reason is not None else score.reward >= FULL_MARKS
        row = {
            "id": job.problem.id,
            "sample": job.first + completion.index,
            "problem": job.problem.problem,
            "answer": job.problem.answer or None,
            "reward": job.problem.reward,
            "prompt": job.text,
            "completion": completion.text,
            "extracted": score.answer,
            "is_correct": is_correct,
            "finish_reason": completion.finish_reason,
            "num_tokens": len(completion.token_ids),
        }
        if job.problem.reward != "math":  # such a reward may need what else the problem's source said
            row["metadata"] = job.problem.metadata
        if config.token_ids or config.log_probs:
            row["token_ids"] = completion.token_ids
        if config.log_probs:
            row["log_probs"] = [round(value, 5) for value in completion.logprobs]
        rows.append(row)
        tally.samples += 1
        tally.tokens += len(completion.token_ids)
        tally.checked += is_correct is not None
        tally.correct += bool(is_correct)
        tally.failed += bool(job.problem.answer) and is_correct is None
    return rows


def _conclude(config: SampleConfig, tally: Tally, seconds: float) -> None:
    """Say what this process has drawn, and what comes next."""
    words = f"{tally.samples:,} samples, {tally.tokens:,} tokens in {seconds:.0f} s"
    if tally.checked:
        words += f"; {tally.correct / tally.checked:.1%} of {tally.checked:,} checked answers are correct"
    if tally.failed:
        words += f"; the reward of {tally.failed:,} could not be computed"
    print(words)
    print(f"The data is {config.out}. Next: m1 distill --data {config.out} …, or m1 sft --data {config.out} … (correct ones)")
