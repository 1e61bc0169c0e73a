"""The text that benchmarks/training.py trains on: what it is by default, and how it becomes documents. No timing here.

By default the completions of GSM8K problems that Qwen2.5-Coder-0.5B-Instruct gave in the evaluation under results/: 21,104
texts of 291 tokens on average and at most 1,024, at hand without a network. Where no tokenizer is named, a byte-level BPE of
4,096 tokens is trained on the first of them; the lengths that it gives add up to those that Qwen's gave, to within 1 %.
"""

import gzip
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from m1.distributed import from_first, is_first
from m1.modeling.loading import load_tokenizer
from m1.training.data import iterate_documents
from m1.training.packing import Document
from m1.training.sources import iterate_rows

RANDOM = "random"  # instead of a source: random tokens
COMPLETIONS = Path(__file__).parent.parent / "results/qwen2.5-coder-0.5b/teacher-sampled/gsm8k.jsonl.gz"
TRAINED_VOCABULARY, TRAINED_ON = 4096, 5000  # tokens, and texts


def documents_of(
    sources: Sequence[str], tokenizer_name: str | None, *, vocab_size: int, num_tokens: int, max_length: int
) -> list[Document]:
    """The first documents, of at least `num_tokens` together if there are as many; the same on all ranks.

    sources: none for the default text, [RANDOM] for random tokens, or data as `m1 distill --data` takes it. Raises ValueError
    for a tokenizer with more tokens than the model has, and as `iterate_rows` does.
    """
    if list(sources) == [RANDOM]:
        return random_documents(vocab_size, num_tokens, max_length)

    def read() -> list[Document] | None:
        if not is_first():
            return None
        tokenizer = _tokenizer(tuple(sources), tokenizer_name)
        if len(tokenizer) > vocab_size:
            raise ValueError(f"--tokenizer: it has {len(tokenizer)} tokens, the model {vocab_size}; name one of this --sizes")
        return _first(iterate_documents(_rows(sources), tokenizer, max_length=max_length), num_tokens)

    documents = from_first(read())
    assert documents is not None
    return documents


def random_documents(vocab_size: int, num_tokens: int, max_length: int) -> list[Document]:
    """Random tokens at lengths as long reasoning has (log-normal, median 493, cut), four fifths of each a completion."""
    generator = np.random.default_rng(0)

    def make() -> Iterator[Document]:
        while True:
            for length in np.clip(generator.lognormal(6.2, 0.7, 256), 32, max_length).astype(int):
                ids = generator.integers(0, vocab_size, length, dtype=np.int32)
                yield Document(ids, np.arange(length) >= length // 5)

    return _first(make(), num_tokens)


def _first(documents: Iterable[Document], num_tokens: int) -> list[Document]:
    taken: list[Document] = []
    for document in documents:
        taken.append(document)
        num_tokens -= len(document.token_ids)
        if num_tokens <= 0:
            break
    return taken


def _rows(sources: Sequence[str]) -> Iterator[Any]:
    if sources:
        return iterate_rows(sources, num_problems=10000, seed=0)
    return _committed_completions()


def _committed_completions() -> Iterator[dict[str, str]]:
    with gzip.open(COMPLETIONS, "rt", encoding="utf-8") as file:
        next(file)  # what made it
        for record in map(json.loads, file):
            for sample in record["samples"]:
                fields = {"prompt": record["problem"] + "\n\n", "completion": sample["text"]}
                yield fields | {"finish_reason": sample["finish_reason"]}


@cache
def _tokenizer(sources: tuple[str, ...], name: str | None) -> PreTrainedTokenizerBase:
    if name is not None:
        return load_tokenizer(name)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.train_from_iterator(
        map(_text, islice(_rows(sources), TRAINED_ON)),
        trainers.BpeTrainer(
            vocab_size=TRAINED_VOCABULARY,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", pad_token="<end>")


def _text(row: Any) -> str:
    """All the words of a row, whichever its shape."""
    fields = row if isinstance(row, dict) else row.fields
    messages = [message["content"] for message in fields.get("messages", [])]
    named = ("prompt", "completion", "problem", "solution", "answer")
    return "\n".join([*messages, *(str(fields[name]) for name in named if fields.get(name))])
