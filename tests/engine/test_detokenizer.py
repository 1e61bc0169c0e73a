"""Text that grows token by token: characters of several bytes, stop strings, what is held back."""

import random

import pytest

from m1.engine.detokenizer import Detokenizer, decode
from tests.engine.models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def push_all(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], Detokenizer]:
    """Pieces handed out after each token of `text`, the last one included."""
    detokenizer, pieces = Detokenizer(TOKENIZER, stop), []
    for token in encode(text):
        detokenizer.push([token])
        pieces.append(detokenizer.take(is_last=False))
        if detokenizer.is_stopped:
            break
    detokenizer.finish()
    pieces.append(detokenizer.take(is_last=True))
    return pieces, detokenizer


def test_pieces_add_up_and_never_hold_half_a_character():
    text = "aé 漢字 🙂! x"
    pieces, _ = push_all(text)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert pieces[0] == "a"


def test_random_bytes_come_out_as_the_tokenizer_decodes_them():
    rng = random.Random(0)
    for _ in range(200):
        ids = [rng.choice([65, 66, 195, 160, 200, 226, 240, 130]) for _ in range(12)]
        detokenizer = Detokenizer(TOKENIZER, ())
        for token in ids:
            detokenizer.push([token])
        detokenizer.finish()
        assert detokenizer.text == decode(TOKENIZER, ids)


@pytest.mark.parametrize("stop", [("lo w",), ("zzz", "w"), ("world", "o w"), ("hello world!",)])
def test_text_ends_before_the_first_stop_string(stop):
    text = "hello world!"
    pieces, detokenizer = push_all(text, stop)
    expected = min((text.split(s)[0] for s in stop), key=len)
    assert detokenizer.is_stopped
    assert detokenizer.text == "".join(pieces) == expected


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none():
    pieces, detokenizer = push_all("ab<x><end", ("<end>",))
    assert pieces == ["a", "b", "", "<x", ">", "", "", "", "", "<end"]
    assert not detokenizer.is_stopped


def test_special_tokens_are_no_text():
    detokenizer = Detokenizer(TOKENIZER, ())
    detokenizer.push([encode("a")[0], TOKENIZER.eos_token_id, encode("b")[0]])
    detokenizer.finish()
    assert detokenizer.text == "ab"
