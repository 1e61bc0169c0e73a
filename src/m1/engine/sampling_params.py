"""`SamplingParams`: what a request may ask of the sampler, in vLLM's field names. No tensors and no randomness here.

Values are checked when the object is made, so an impossible request never reaches the engine.
"""

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

MAX_SAMPLES = 4096
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class SamplingParams:
    """How to complete one prompt.

    n: completions of the prompt; it is prefilled once for all of them.
    temperature: 0 takes the most likely token; top_k (0 or -1 is off), top_p and min_p limit the choice, as in vLLM.
    seed: the same seed gives the same tokens whatever else is in the batch; None draws a fresh one.
    max_tokens: longest completion; None goes on to the engine's `max_model_len`.
    stop: strings that end a completion; the text stops before the first of them. stop_token_ids: tokens that end it.
    logprobs: how many of the most likely tokens to record at every place, at most 20, with their log-probabilities; the chosen
    token's own is always recorded.
    ignore_eos: go on after the end token.

    Raises ValueError naming the field for a value that is out of range or contradicts another.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    stop_strings: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        object.__setattr__(self, "stop_strings", stop)
        _require(_is_int(self.n) and 1 <= self.n <= MAX_SAMPLES, "n", f"1 to {MAX_SAMPLES}", self.n)
        _require(0 <= self.temperature < float("inf"), "temperature", "at least 0", self.temperature)
        _require(0 < self.top_p <= 1, "top_p", "in (0, 1]; 1 is off", self.top_p)
        _require(_is_int(self.top_k) and self.top_k >= -1, "top_k", "at least 1, or 0 for off", self.top_k)
        _require(0 <= self.min_p <= 1, "min_p", "in [0, 1]; 0 is off", self.min_p)
        _require(self.seed is None or _is_int(self.seed), "seed", "an integer or None", self.seed)
        _require(
            self.max_tokens is None or (_is_int(self.max_tokens) and self.max_tokens >= 1),
            "max_tokens",
            "at least 1, or None for no limit but the model's",
            self.max_tokens,
        )
        _require(all(isinstance(s, str) and s for s in stop), "stop", "non-empty strings", self.stop)
        _require(
            all(_is_int(t) and t >= 0 for t in self.stop_token_ids or ()), "stop_token_ids", "token ids", self.stop_token_ids
        )
        _require(
            self.logprobs is None or (_is_int(self.logprobs) and 0 <= self.logprobs <= MAX_LOGPROBS),
            "logprobs",
            f"None or 0 to {MAX_LOGPROBS}",
            self.logprobs,
        )
        _require(
            self.n == 1 or self.temperature > 0,
            "n",
            "1 at temperature 0, where all completions would be the same; raise the temperature",
            self.n,
        )

    def sample_seeds(self, first: int = 0) -> list[int]:
        """The seed of each of n completions from number `first` on, signed 64-bit: a hash of (seed, number); fresh ones without
        a seed."""
        base = secrets.randbits(64) if self.seed is None else self.seed
        return [_hash64(f"{base}/{index}") for index in range(first, first + self.n)]


def _hash64(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require(is_met: bool, name: str, expected: str, given: object) -> None:
    if not is_met:
        raise ValueError(f"sampling {name}: expected {expected}; given {given!r}")
