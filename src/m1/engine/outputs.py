"""What becomes of sampled tokens: when a completion stops, its text, its deltas. Knows requests, not the scheduler."""

from transformers import PreTrainedTokenizerBase

from m1.engine.decode_table import News
from m1.engine.detokenizer import Detokenizer, decode
from m1.engine.sequence import Completion, Delta, FinishReason, Request, Sequence


class OutputProcessor:
    """Follows every running completion from token to text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokenizer = tokenizer
        self._detokenizers: dict[Sequence, Detokenizer] = {}
        self._ended: list[tuple[Request, Completion]] = []

    def take_ended(self) -> list[tuple[Request, Completion]]:
        """The completions that were closed since the last call, with their requests."""
        ended, self._ended = self._ended, []
        return ended

    def take(self, news: News, top_logprobs: dict[int, float] | None = None) -> FinishReason | None:
        """Look at a sequence's newest token: the reason to `close` it, or None to go on, when streams get their delta."""
        sequence, token = news.sequence, news.token
        request = sequence.request
        if request.params.logprobs:
            assert top_logprobs is not None
            sequence.top_logprobs.append(top_logprobs)
        is_stop_token = token in request.stop_ids
        detokenizer = self._detokenizer(sequence)
        if detokenizer is not None and not is_stop_token:
            detokenizer.push([token])
        reason: FinishReason | None = None
        if is_stop_token or (detokenizer is not None and detokenizer.is_stopped):
            reason = "stop"
        elif news.is_full:
            reason = "length"
        if reason is None and request.on_delta is not None:
            text = detokenizer.take(is_last=False) if detokenizer is not None else ""
            top = [top_logprobs] if top_logprobs is not None else None
            request.on_delta(Delta(sequence.index, text, [token], [news.logprob], top_logprobs=top))
        return reason

    def _detokenizer(self, sequence: Sequence) -> Detokenizer | None:
        """The growing text of a sequence, where someone needs it before the end."""
        request = sequence.request
        if self.tokenizer is None or not (request.params.stop_strings or request.on_delta):
            return None
        if sequence not in self._detokenizers:
            self._detokenizers[sequence] = Detokenizer(self.tokenizer, request.params.stop_strings)
        return self._detokenizers[sequence]

    def close(self, sequence: Sequence, reason: FinishReason) -> None:
        """Enter the completion of a sequence that ends here, for whatever reason."""
        request, ids = sequence.request, sequence.generated
        detokenizer = self._detokenizers.pop(sequence, None)
        if detokenizer is not None:
            detokenizer.finish()
            text = detokenizer.text
        else:
            text = decode(self.tokenizer, ids[:-1] if ids and ids[-1] in request.stop_ids else ids)
        top = sequence.top_logprobs if request.params.logprobs else None
        self._enter(request, Completion(text, ids, sequence.logprobs, reason, sequence.index, top))
        if request.on_delta is not None:
            rest = detokenizer.take(is_last=True) if detokenizer is not None else ""
            newest = 0 if reason == "abort" else 1
            first = len(ids) - newest
            tokens, logprobs = ids[first:], sequence.logprobs[first:]
            request.on_delta(Delta(sequence.index, rest, tokens, logprobs, reason, top[first:] if top is not None else None))

    def close_unborn(self, request: Request, index: int) -> None:
        """Enter an aborted completion that never got a sequence of its own."""
        self._enter(request, Completion("", [], [], "abort", index))
        if request.on_delta is not None:
            request.on_delta(Delta(index, "", [], [], "abort"))

    def _enter(self, request: Request, completion: Completion) -> None:
        request.completions[completion.index] = completion
        self._ended.append((request, completion))
