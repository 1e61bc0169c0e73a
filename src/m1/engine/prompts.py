"""From what a user gives (text, token ids, chat messages) to a checked `Request`. Nothing is scheduled here."""

from collections.abc import Callable
from typing import cast

from transformers import PreTrainedTokenizerBase

from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Delta, Request

Prompt = str | list[int] | list[dict[str, str]]


class RequestFactory:
    """Makes requests for one model: knows its tokenizer, its vocabulary, its end tokens and its length limit."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, eos_ids: frozenset[int], max_model_len: int
    ) -> None:
        self.tokenizer, self.vocab_size, self.eos_ids, self.max_model_len = tokenizer, vocab_size, eos_ids, max_model_len
        self._num_made = 0

    def make(
        self,
        prompt: Prompt,
        params: SamplingParams,
        on_delta: Callable[[Delta], None] | None = None,
        first_sample: int = 0,
    ) -> Request:
        """The request for a prompt: raw text (special tokens added), token ids, or chat messages (templated).

        first_sample: what its first completion draws is what completion number `first_sample` of a larger request would.
        Raises ValueError for an empty prompt, one that leaves no room for a new token, ids outside the vocabulary, text or
        stop strings without a tokenizer, and messages without a chat template.
        """
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params: expected SamplingParams, given {type(params).__name__}")
        ids = encode_prompt(prompt, self.tokenizer, self.vocab_size)
        if not ids:
            raise ValueError("the prompt is empty; give at least one token")
        if len(ids) >= self.max_model_len:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, but max_model_len {self.max_model_len} must hold it and at least one more; "
                "shorten the prompt, or raise max_model_len"
            )
        if params.stop_strings and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer; give the engine one, or use stop_token_ids")
        room = self.max_model_len - len(ids)
        self._num_made += 1
        return Request(
            number=self._num_made,
            prompt=ids,
            params=params,
            max_tokens=room if params.max_tokens is None else min(params.max_tokens, room),
            stop_ids=(frozenset() if params.ignore_eos else self.eos_ids) | frozenset(params.stop_token_ids or ()),
            seeds=params.sample_seeds(first_sample),
            on_delta=on_delta,
        )


def encode_prompt(prompt: Prompt, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[int]:
    """Token ids of raw text (special tokens added), of chat messages (templated), or ids themselves, checked.

    Raises ValueError for ids outside the vocabulary, anything but ids without a tokenizer, messages without a chat template.
    """
    if isinstance(prompt, str):
        return _needed(tokenizer, "text").encode(prompt)
    if not isinstance(prompt, list):
        raise ValueError(f"expected text, a list of token ids or a list of messages, given {type(prompt).__name__}")
    if prompt and isinstance(prompt[0], dict):
        return _encode_messages(prompt, _needed(tokenizer, "messages"))
    for place, token in enumerate(prompt):
        if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
            raise ValueError(f"token {place} is {token!r}; expected an id from 0 to {vocab_size - 1}")
    return cast(list[int], prompt)


def _encode_messages(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    for place, message in enumerate(messages):
        if not isinstance(message, dict) or "role" not in message:
            raise ValueError(f'message {place}: expected {{"role": …, "content": …}}, given {message!r}')
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template for a list of messages; give text or token ids")
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(str(text), add_special_tokens=False)


def _needed(tokenizer: PreTrainedTokenizerBase | None, kind: str) -> PreTrainedTokenizerBase:
    if tokenizer is None:
        raise ValueError(f"the prompt is {kind}, but the engine has no tokenizer; give it one, or give token ids")
    return tokenizer
