"""From token ids to text: at once for a finished completion, piece by piece for a stream, and with an eye on stop strings.

Text is built incrementally only where someone waits for it (a stream, or stop strings); otherwise once, at the end.
"""

from collections.abc import Sequence as Strings

from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"  # what a tokenizer shows for bytes that are not yet a character


def decode(tokenizer: PreTrainedTokenizerBase | None, token_ids: list[int]) -> str:
    """The text of whole completions; "" without a tokenizer. Special tokens are left out."""
    if tokenizer is None:
        return ""
    return str(tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


class Detokenizer:
    """The growing text of one completion.

    A token's text can depend on its predecessor (a leading space) and on its successors (bytes of one character). So new
    text is the difference between decoding a short window with and without the newest tokens, held back while it ends in
    an incomplete character.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Strings[str]) -> None:
        self._tokenizer, self._stop = tokenizer, stop
        self._ids: list[int] = []
        self._window, self._read = 0, 0  # tokens before `_read` are in the text; decoding begins at `_window`
        self._sent = 0
        self.text = ""
        self.is_stopped = False

    def push(self, token_ids: list[int]) -> None:
        """Take in new tokens. When a stop string appears, the text ends before it and `is_stopped` is set."""
        assert not self.is_stopped
        self._ids += token_ids
        before = decode(self._tokenizer, self._ids[self._window : self._read])
        after = decode(self._tokenizer, self._ids[self._window :])
        if after.endswith(REPLACEMENT) or len(after) <= len(before):
            return
        self._window, self._read = self._read, len(self._ids)
        self._append(after[len(before) :])

    def finish(self) -> None:
        """Let go of what was held back, incomplete characters included."""
        if self.is_stopped:
            return
        before = decode(self._tokenizer, self._ids[self._window : self._read])
        self._append(decode(self._tokenizer, self._ids[self._window :])[len(before) :])

    def _append(self, piece: str) -> None:
        # A stop string may have begun in earlier text, at most its own length - 1 back.
        longest = max(map(len, self._stop), default=1)
        start = max(0, len(self.text) - longest + 1)
        self.text += piece
        places = [place for place in (self.text.find(stop, start) for stop in self._stop) if place >= 0]
        if places:
            self.text, self.is_stopped = self.text[: min(places)], True

    def take(self, *, is_last: bool) -> str:
        """Text not yet handed out; unless it is the last, without an end that may become a stop string."""
        end = len(self.text) if is_last or self.is_stopped else len(self.text) - self._num_held()
        piece, self._sent = self.text[self._sent : end], max(self._sent, end)
        return piece

    def _num_held(self) -> int:
        """Length of the longest end of the text that is a proper beginning of a stop string."""
        for length in range(min(max(map(len, self._stop), default=1) - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-length:]) for stop in self._stop if len(stop) > length):
                return length
        return 0
