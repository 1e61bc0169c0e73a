"""What the engine works on: a `Request` is one prompt, a `Sequence` one completion of it on its way, a `Completion` the result.

A sequence's tokens are computed up to the last one, by prefill; that last one is then fed to a decode step, which samples the
next. So prefill never samples, every decode step has one shape, and n completions of a prompt can part at one point: before
its last token. No tensors here.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Literal

from m1.engine.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


@dataclass
class Completion:
    """One finished completion. The end token is in `token_ids`, not in `text`.

    logprobs: of each chosen token under the model's distribution at the sampling temperature (at 0: at temperature 1), before
    top_k, top_p and min_p. top_logprobs: {token id: log-probability} of the most likely tokens at each place, in falling order,
    as many as `SamplingParams.logprobs` asked for; None where it did not.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    index: int
    top_logprobs: list[dict[int, float]] | None = None


@dataclass(frozen=True)
class Delta:
    """News of one completion in a stream: text and tokens since the last one; the last of each completion has a finish_reason.

    Text trails tokens while it could still turn out to be part of a stop string or of a character.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason | None = None
    top_logprobs: list[dict[int, float]] | None = None


class Status(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(eq=False)
class Request:
    """One prompt, and its completions as they finish."""

    number: int  # order of arrival
    prompt: list[int]
    params: SamplingParams
    max_tokens: int  # new tokens a completion, the model's limit included
    stop_ids: frozenset[int]
    seeds: list[int]  # of each completion
    completions: dict[int, Completion] = field(default_factory=dict)
    on_delta: Callable[[Delta], None] | None = None
    error: BaseException | None = None  # of the step that failed with this request in it

    @property
    def is_finished(self) -> bool:
        return len(self.completions) == self.params.n

    @property
    def wants_every_token(self) -> bool:
        """Whether tokens must be looked at one by one as they come, and not only at the end."""
        return self.on_delta is not None or bool(self.params.stop_strings or self.params.logprobs)


class Sequence:
    """One completion on its way. The first of a request leads: it prefills the prompt, then the others fork off it.

    num_computed: tokens in its state. `is_ready` means all but the last are, so that the next step decodes. While it decodes,
    its row of the `DecodeTable` counts instead, and `tokens`, `logprobs` and `num_computed` stay as they were.
    pending: sample indices that have yet to fork off; the sequence itself does not decode before they have.
    cuts: token counts at which prefill pauses for a snapshot of the state.
    """

    def __init__(self, request: Request, index: int, pending: list[int] | None = None) -> None:
        self.request, self.index = request, index
        self.pending = pending or []
        self.tokens = list(request.prompt)
        self.logprobs: list[float] = []
        self.top_logprobs: list[dict[int, float]] = []
        self.status = Status.WAITING
        self.num_computed = 0
        self.slot: int | None = None
        self.pages: list[int] = []
        self.cuts: list[int] = []

    def __repr__(self) -> str:
        return f"Sequence({self.request.number}/{self.index}, {self.status.name}, {self.num_computed} of {len(self.tokens)})"

    @property
    def key(self) -> tuple[int, int]:
        """Its place in the order of arrival."""
        return self.request.number, self.index

    @property
    def seed(self) -> int:
        return self.request.seeds[self.index]

    @property
    def num_prefill(self) -> int:
        """Tokens to have in its state before it can decode: all but the last."""
        return len(self.tokens) - 1

    @property
    def is_ready(self) -> bool:
        return self.num_computed == len(self.tokens) - 1

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def generated(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    def sibling(self, index: int) -> "Sequence":
        """Another completion of the same prompt, with the same tokens computed; its state is the cache's business."""
        assert self.is_ready
        assert not self.num_generated
        other = Sequence(self.request, index)
        other.num_computed, other.status = self.num_computed, Status.RUNNING
        return other
