"""Rows to documents: the chat template, the tokens, and which of them the loss is on. No files here, and no batches.

A completion is what the model should write: assistant turns, up to and with the end token. It is tokenised apart from what
stands before it, as at inference, where the prompt is tokenised alone.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from m1.config import PROBLEM_SUFFIX
from m1.training.packing import Document
from m1.training.process_map import map_in_processes
from m1.training.sources import Row, as_rows

Segment = tuple[str, bool]  # a piece of text, and whether the model should write it
_ROWS_AT_ONCE = 1024  # tokenised together: the tokenizer works on them in parallel
_BLOCKS_OF_SMALL_DATA = 8  # so many of these don't wait for other processes, which take seconds to start
_FIELDS = ("messages", "prompt", "completion", "problem", "answer", "solution", "finish_reason")  # what is read of a row


def make_documents(
    rows: Iterable[Row | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str = "completion",
    suffix: str = PROBLEM_SUFFIX,
) -> list[Document]:
    """All documents of `iterate_documents`."""
    return list(iterate_documents(rows, tokenizer, max_length=max_length, loss_on=loss_on, suffix=suffix))


def iterate_documents(
    rows: Iterable[Row | Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    loss_on: str = "completion",
    suffix: str = PROBLEM_SUFFIX,
    num_processes: int = 1,
) -> Iterator[Document]:
    """Tokenised documents of at most `max_length` tokens; longer ones are cut, and those left without a target are dropped.

    Rows have messages, prompt and completion (a user's and an assistant's turn where the tokenizer has a chat template), or
    problem and answer (the user's turn is the problem and `suffix`; the completion is the row's `solution` if there is one,
    and the answer in a box). A sample that was cut off (`finish_reason` "length") gets no end token. `loss_on` is
    "completion" (assistant turns) or "all" (every token but the first). With several processes the documents are the same, and
    in the same order; `num_processes` says how many, and only large data starts them.
    Raises ValueError for an ill-formed row, messages without a chat template, and when no document is left.
    """
    if loss_on not in ("completion", "all"):
        raise ValueError(f"loss_on: expected 'completion' or 'all', got {loss_on!r}")
    is_any_left = False
    make = _DocumentMaker(SegmentEncoder(tokenizer), max_length, loss_on, suffix)
    all_rows = (Row({key: row.fields[key] for key in _FIELDS if key in row.fields}, row.where) for row in as_rows(rows))
    blocks = iter(lambda: list(islice(all_rows, _ROWS_AT_ONCE)), [])
    for documents in map_in_processes(
        make, blocks, num_processes=num_processes, num_here=_BLOCKS_OF_SMALL_DATA, preload=__name__
    ):
        is_any_left |= bool(documents)
        yield from documents
    if not is_any_left:
        raise ValueError(f"data: no document has a completion within --max-length {max_length} tokens")


@dataclass(frozen=True)
class _DocumentMaker:
    """Makes the documents of some rows, whose other fields don't matter."""

    encoder: "SegmentEncoder"
    max_length: int
    loss_on: str
    suffix: str

    def __call__(self, rows: Sequence[Row]) -> list[Document]:
        tokenizer, documents = self.encoder.tokenizer, []
        conversations = [(segments, row) for row in rows for segments in _segments_of_row(row, tokenizer, self.suffix)]
        encoded = self.encoder.encode([segments for segments, _ in conversations])
        for (token_ids, is_completion), (_, row) in zip(encoded, conversations, strict=True):
            if row.fields.get("finish_reason") == "length":  # a sample that was cut off did not end here
                token_ids, is_completion = token_ids[:-1], is_completion[:-1]
            is_target = np.ones(len(token_ids), dtype=bool) if self.loss_on == "all" else is_completion
            documents.append(Document(token_ids[: self.max_length], is_target[: self.max_length]))
        return [document for document in documents if document.num_targets]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokens of a prompt to be completed: a user's turn and the start of the assistant's, or raw text without a template."""
    if not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    rendered = _render(tokenizer, [{"role": "user", "content": text}], add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


def user_prefix(tokenizer: PreTrainedTokenizerBase, system: str = "") -> str:
    """The beginning of a conversation up to where the user's words stand. The tokenizer must have a chat template."""
    mark = "\x00user\x00"
    messages = [{"role": "system", "content": system}] if system else []
    rendered = _render(tokenizer, [*messages, {"role": "user", "content": mark}], add_generation_prompt=False)
    return rendered.partition(mark)[0]


class SegmentEncoder:
    """Tokenises texts that are given in segments, and keeps track of which tokens belong to completions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        # SentencePiece tokenizers put a space before every text: their segments can't be tokenised one by one.
        self.prepends_space = tokenizer.tokenize("a")[:1] == ["▁a"]
        first = tokenizer("a")["input_ids"][0]
        # A chat template writes the start token itself; raw text gets it where the tokenizer adds one.
        self.start = [first] if first == tokenizer.bos_token_id and not tokenizer.chat_template else []

    def encode(self, conversations: Sequence[Sequence[Segment]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(token_ids int32, is_completion bool) of each conversation; each ends with the end token."""
        encode = self._encode_whole if self.prepends_space else self._encode_apart
        for pieces in encode(conversations):
            ids, flags = list(self.start), [False] * len(self.start)
            for piece, is_completion in pieces:
                num_written = self._num_written(piece) if is_completion else 0
                ids += piece
                flags += [True] * num_written + [False] * (len(piece) - num_written)
            if True in flags:  # leave out what a template puts after the last end token
                length = len(flags) - flags[::-1].index(True)
                ids, flags = ids[:length], flags[:length]
            if not ids or ids[-1] != self.tokenizer.eos_token_id:
                ids.append(self.tokenizer.eos_token_id)
                flags.append(True)
            yield np.array(ids, dtype=np.int32), np.array(flags, dtype=bool)

    def _num_written(self, piece: list[int]) -> int:
        """How many tokens of a completion the model writes: up to its end token; templates put a line break after it."""
        end = self.tokenizer.eos_token_id
        return len(piece) - piece[::-1].index(end) if end in piece else len(piece)

    def _encode_apart(self, conversations: Sequence[Sequence[Segment]]) -> Iterator[list[tuple[list[int], bool]]]:
        texts = [text for segments in conversations for text, _ in segments]
        pieces = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        for segments in conversations:
            yield [(next(pieces), is_completion) for _, is_completion in segments]

    def _encode_whole(self, conversations: Sequence[Sequence[Segment]]) -> Iterator[list[tuple[list[int], bool]]]:
        """A token belongs to the segment in which it starts."""
        texts = ["".join(text for text, _ in segments) for segments in conversations]
        encoded = self.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for segments, ids, offsets in zip(conversations, encoded["input_ids"], encoded["offset_mapping"]):
            ends = np.cumsum([len(text) for text, _ in segments])
            owners = np.searchsorted(ends, [start for start, _ in offsets], side="right")
            yield [
                ([token for token, owner in zip(ids, owners) if owner == number], is_completion)
                for number, (_, is_completion) in enumerate(segments)
            ]


def _segments_of_row(row: Row, tokenizer: PreTrainedTokenizerBase, suffix: str) -> list[list[Segment]]:
    """The documents that a row becomes, in segments: one, or one a turn where the template rewrites earlier turns."""
    fields = row.fields
    if "messages" in fields:
        if not tokenizer.chat_template:
            raise ValueError(
                f"{row.where}: 'messages' need a chat template, and the tokenizer has none; add chat_template.jinja to the "
                "model's directory, or use data with 'prompt' and 'completion'"
            )
        return _segments_of_messages([dict(message) for message in fields["messages"]], tokenizer, row.where)
    if "prompt" in fields:
        prompt, completion = fields["prompt"], fields["completion"]
    else:
        prompt, completion = fields["problem"] + suffix, _solution_of(fields)
    if not tokenizer.chat_template:
        return [[(prompt, False), (completion, True)]]
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    return _segments_of_messages(turns, tokenizer, row.where)


def _solution_of(fields: Mapping[str, Any]) -> str:
    solution, box = fields.get("solution"), f"\\boxed{{{fields['answer']}}}"
    if not solution:
        return box
    return solution if "\\boxed" in solution else f"{solution}\n{box}"


def _segments_of_messages(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> list[list[Segment]]:
    """Prompts and assistant turns in turn, found by rendering the conversation up to each of them."""
    try:
        turns = [
            (
                _render(tokenizer, messages[:index], add_generation_prompt=True),
                _render(tokenizer, messages[: index + 1], add_generation_prompt=False),
            )
            for index, message in enumerate(messages)
            if message["role"] == "assistant"
        ]
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
    for before, after in turns:
        if not after.startswith(before):
            raise ValueError(f"{where}: the chat template does not let an assistant turn follow its own generation prompt")
    ends = ["", *(after for _, after in turns)]
    if all(before.startswith(end) for (before, _), end in zip(turns, ends)):
        pairs = [(before[len(end) :], after[len(before) :]) for (before, after), end in zip(turns, ends)]
        return [[segment for prompt, reply in pairs for segment in ((prompt, False), (reply, True))]]
    # Templates that drop earlier thoughts: each reply is learnt after what the model would see before it.
    return [[(before, False), (after[len(before) :], True)] for before, after in turns]


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], *, add_generation_prompt: bool) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt))
