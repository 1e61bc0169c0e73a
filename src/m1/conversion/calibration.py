"""Text for the improved start's fit: JSON lines or plain strings, tokenized and cut. Not the data of training.

A few thousand tokens are enough, so rows are read simply, in the order of the files, without packing or masks.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from m1.json_lines import Files, files_of, numbered_lines

MAX_LENGTH = 512

Text = str | list[dict[str, str]] | list[int]  # raw text, chat messages, or token ids


def tokenize_documents(texts: Sequence[Text], tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> list[list[int]]:
    """Token ids of the texts, each cut at `MAX_LENGTH`, until there are `max_tokens`.

    Raises ValueError if there is nothing to tokenize, or text but no tokenizer.
    """
    documents: list[list[int]] = []
    remaining = max_tokens
    for text in texts:
        ids = _tokenize(text, tokenizer)[: min(MAX_LENGTH, remaining)]
        if ids:
            documents.append(ids)
            remaining -= len(ids)
        if remaining <= 0:
            break
    if not documents:
        raise ValueError("calibration: expected at least one text with a token in it, got none")
    return documents


def _tokenize(text: Text, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    if not isinstance(text, str) and not any(isinstance(item, dict) for item in text):
        return cast(list[int], text)
    if tokenizer is None:
        raise ValueError("calibration: expected token ids, or text and a tokenizer; got text and no tokenizer")
    if isinstance(text, str):
        return tokenizer(text).input_ids
    messages = cast(list[dict[str, str]], text)
    if not tokenizer.chat_template:
        return tokenizer("\n\n".join(message["content"] for message in messages)).input_ids
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False).input_ids


def read_texts(sources: Sequence[str]) -> Iterator[Text]:
    """The texts of JSON-lines files (.gz too) and of directories of `m1 sample`, row after row of each.

    Rows have `messages`, `prompt` and `completion`, `problem` and `solution` or `answer`, or `text`. Raises
    FileNotFoundError, and ValueError that names file and line.
    """
    for source in sources:
        files, is_empty = files_of(source), True
        for path in files.paths:
            for number, line in numbered_lines(path):
                text = _text_of_row(line, f"{path}, line {number}", files)
                if text is not None:
                    yield text
                    is_empty = False
        if is_empty:
            raise ValueError(f"calibration: {source}: no rows in it")


def _text_of_row(line: bytes, place: str, files: Files) -> Text | None:
    """The text of a row, or None if the row is not one of those meant."""
    try:
        row: Any = json.loads(line)
    except ValueError as error:  # malformed, or not UTF-8
        raise ValueError(f"{place}: not valid JSON: {error}") from error
    if isinstance(row, dict):
        if not files.has(row):
            return None
        if row.get("messages"):
            return row["messages"]
        for question, answers in {"prompt": ("completion",), "problem": ("solution", "answer")}.items():
            answer = next((row[key] for key in answers if row.get(key)), None)
            if row.get(question) and answer is not None:
                return [{"role": "user", "content": str(row[question])}, {"role": "assistant", "content": str(answer)}]
        if row.get("text"):
            return str(row["text"])
    raise ValueError(f"{place}: expected messages, prompt and completion, problem and answer, or text")
