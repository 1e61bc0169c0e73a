"""Sampling completions while the model trains: the `Sampler` that GRPO and on-policy distillation need, the engine behind
it, and the prompts' order.

Only this file of the room knows the engine. Rewards, advantages and losses are not decided here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from m1.config import RolloutConfig
from m1.distributed import gather, is_distributed, num_ranks, rank
from m1.engine import Engine, SamplingParams
from m1.engine.weights import sampling_copy
from m1.modeling import M1ForCausalLM
from m1.training.sharding import full_parameters

T = TypeVar("T")

# Share of the memory free at the first sampling that states and pages take; the rest is for the optimizer and activations.
SAMPLER_MEMORY_FRACTION = 0.4


@dataclass(frozen=True)
class Sample:
    """One completion: its tokens (the end token among them) and their log-probs at the sampling temperature, and its text."""

    token_ids: list[int]
    log_probs: list[float]
    text: str
    is_truncated: bool


class Sampler(Protocol):
    """Samples from the model as it is at the time of the call."""

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
    ) -> list[list[Sample]]:
        """For each prompt (token ids) with its seed, `num_samples` completions, which depend on these and the weights alone.

        All ranks call it together, also one that has no prompt.
        """


class EngineSampler:
    """`Sampler` on m1.engine, which shares the model's weights where it samples in their dtype, and copies them otherwise.

    precision: "float32" or "bfloat16", the sampler's. max_length: tokens of the longest prompt with its completion. With a
    process group it must be made before the model is divided: each rank then samples from a whole copy of its own, which takes
    the trained weights before every call, from device to device. keeps_memory: states, pages and captured steps stay on the
    device between calls from the first one on; else as soon as there has been room for them.
    """

    def __init__(
        self,
        model: M1ForCausalLM,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        precision: str,
        max_length: int,
        keeps_memory: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.keeps_memory = model, tokenizer, keeps_memory
        self.dtype, self.max_length = getattr(torch, precision), max_length
        self._copy = sampling_copy(model, self.dtype) if is_distributed() else None
        self._engine: Engine | None = None  # made at the first call, when the trainer's own memory is taken

    def sample(
        self,
        prompts: Sequence[list[int]],
        *,
        seeds: Sequence[int],
        num_samples: int,
        max_new_tokens: int,
        temperature: float,
    ) -> list[list[Sample]]:
        params = [
            SamplingParams(n=num_samples, temperature=temperature, max_tokens=max_new_tokens, seed=seed) for seed in seeds
        ]
        was_training = self.model.training
        self.model.eval()
        engine = self._engine or self._make_engine()
        try:
            engine.update_weights(full_parameters(self.model) if self._copy is not None else None)
            completions = engine.generate(list(prompts), params)
        finally:
            if not self.keeps_memory:
                engine.sleep_unless_room()  # its states and pages are the trainer's memory until the next call
            self.model.train(was_training)
        return [
            [Sample(one.token_ids, one.logprobs, one.text, one.finish_reason == "length") for one in of_prompt]
            for of_prompt in completions
        ]

    def _make_engine(self) -> Engine:
        self._engine = Engine(
            self._copy if self._copy is not None else self.model,
            self.tokenizer,
            dtype=None if self._copy is not None else self.dtype,
            max_model_len=self.max_length,
            memory_fraction=SAMPLER_MEMORY_FRACTION,
        )
        return self._engine


def seeds_of(*numbers: int, count: int) -> list[int]:
    """`count` seeds that depend on all `numbers`, one a prompt, so that the same prompt drawn twice is not sampled alike."""
    return np.random.default_rng(numbers).integers(2**62, size=count).tolist()


def mine(items: Sequence[T]) -> Sequence[T]:
    """This rank's share of what all ranks hold alike: item i belongs to rank i modulo their number."""
    return items[rank() :: num_ranks()]


def of_all(shares: Sequence[T], count: int) -> list[T]:
    """What the ranks made of their shares of `count` items, in the items' order, on every rank."""
    whole: list[Any] = [None] * count
    for number, share in enumerate(gather(list(shares))):
        whole[number :: num_ranks()] = share
    return whole


class ProblemStream(Generic[T]):
    """Problems (or prompts) without end, every epoch in another order that the seed fixes; the position resumes."""

    def __init__(self, problems: Sequence[T], seed: int) -> None:
        if not problems:
            raise ValueError("problems: the data set is empty")
        self.problems, self.seed, self.position = list(problems), seed, 0

    def next_problems(self, count: int) -> list[T]:
        drawn: list[T] = []
        while len(drawn) < count:
            epoch, index = divmod(self.position, len(self.problems))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.problems))
            taken = order[index : index + count - len(drawn)]
            drawn += [self.problems[i] for i in taken]
            self.position += len(taken)
        return drawn

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "problems": len(self.problems)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["problems"] != len(self.problems):
            raise ValueError("data: not the problems that this run began with; restore the data, or give another --out")
        self.position = state["position"]


def check_rollout_settings(config: RolloutConfig) -> None:
    """ValueError for settings of sampling that can't work together."""
    for name in ("problems_per_step", "samples_per_problem", "max_new_tokens"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, got {getattr(config, name)}")
    if config.temperature <= 0:
        raise ValueError(f"--temperature: expected more than 0, so that samples differ, got {config.temperature}")
    if config.max_new_tokens >= config.max_length:
        raise ValueError(
            f"--max-new-tokens {config.max_new_tokens} leaves no room for a prompt within --max-length {config.max_length}"
        )


def with_room(problems: Sequence[T], to_prompt: Callable[[T], list[int]], config: RolloutConfig) -> list[T]:
    """The problems whose prompt and `max_new_tokens` fit into `max_length`; ValueError if there is none."""
    room = config.max_length - config.max_new_tokens
    kept = [problem for problem in problems if len(to_prompt(problem)) <= room]
    if not kept:
        raise ValueError(
            f"data: no problem's prompt leaves room for --max-new-tokens {config.max_new_tokens} within --max-length "
            f"{config.max_length}"
        )
    return kept
