"""Sampling completions of problems while the model trains: the `Sampler` that GRPO needs, and the engine behind it.

Only this file of the room knows the engine. Rewards, advantages and losses are not decided here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from m1.engine import Engine, SamplingParams
from m1.modeling import M1ForCausalLM
from m1.reasoning.problems import Problem

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
        self, prompts: Sequence[list[int]], *, num_samples: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        """For each prompt (token ids), `num_samples` completions; the same call on the same weights gives the same ones."""


class EngineSampler:
    """`Sampler` on m1.engine, which shares the model's weights where it samples in their dtype, and copies them otherwise.

    precision: "float32" or "bfloat16", the sampler's. max_length: tokens of the longest prompt with its completion.
    """

    def __init__(
        self, model: M1ForCausalLM, tokenizer: PreTrainedTokenizerBase | None, *, precision: str, max_length: int
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.dtype, self.max_length = getattr(torch, precision), max_length
        self._engine: Engine | None = None  # made at the first call, when the trainer's own memory is taken

    def sample(
        self, prompts: Sequence[list[int]], *, num_samples: int, max_new_tokens: int, temperature: float, seed: int
    ) -> list[list[Sample]]:
        if self._engine is None:
            self._engine = Engine(
                self.model,
                self.tokenizer,
                dtype=self.dtype,
                max_model_len=self.max_length,
                memory_fraction=SAMPLER_MEMORY_FRACTION,
            )
        engine = self._engine
        params = [
            SamplingParams(n=num_samples, temperature=temperature, max_tokens=max_new_tokens, seed=own)
            for own in _seeds(seed, len(prompts))
        ]
        was_training = self.model.training
        self.model.eval()
        try:
            engine.update_weights()
            completions = engine.generate(list(prompts), params)
        finally:
            engine.sleep()  # its states and pages are the trainer's memory until the next call
            self.model.train(was_training)
        return [
            [Sample(one.token_ids, one.logprobs, one.text, one.finish_reason == "length") for one in of_prompt]
            for of_prompt in completions
        ]


class ProblemStream:
    """Problems without end, every epoch in another order that the seed fixes; the position resumes."""

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise ValueError("problems: the data set is empty")
        self.problems, self.seed, self.position = list(problems), seed, 0

    def next_problems(self, count: int) -> list[Problem]:
        drawn: list[Problem] = []
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


def _seeds(seed: int, count: int) -> list[int]:
    """A seed for each prompt, so that the same prompt drawn twice is not sampled alike."""
    return np.random.default_rng(seed).integers(2**62, size=count).tolist()
