"""`Replicas`: data parallel sampling, an engine a rank under torchrun; prompts go to whoever has room for them.

Every rank calls `generate`; the first rank's prompts count. Those with the most work are handed out first, a few at a time,
by a counter that all ranks share, so that fast ranks take more and all end at about the same time. Which rank completes a
prompt has no influence on its tokens, as far as a seed is given.
"""

from itertools import count
from typing import Any

import torch
import torch.distributed as dist

from m1.engine.llm import Engine
from m1.engine.prompts import Prompt
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Completion, Request

SHARES_A_RANK = 16  # into so many parts the average rank's work is cut: the last one is what ranks wait for
_calls = count()  # the same on every rank, as collectives are


class Replicas:
    """The engines of all ranks as one. Needs a process group, whose object collectives carry prompts and completions."""

    def __init__(self, engine: Engine) -> None:
        if not dist.is_initialized():
            raise ValueError("replicas need a process group: start with torchrun and call torch.distributed.init_process_group")
        self.engine = engine

    def generate(
        self, prompts: list[Prompt] | None, params: SamplingParams | list[SamplingParams] | None
    ) -> list[list[Completion]]:
        """Complete the first rank's prompts, as `Engine.generate` does; every rank returns all completions, in order.

        Collective: every rank must call it; what other ranks than the first give is not looked at. Raises what
        `Engine.generate` would for a bad prompt, on every rank; RuntimeError on every rank if a step failed on one.
        """
        work: list[Any] = [self._checked(prompts, params) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(work, src=0, device=torch.device("cpu"))
        if isinstance(work[0], ValueError):
            raise work[0]
        failure: str | None = None
        mine: dict[int, list[Completion]] = {}
        try:
            mine = self._complete(work[0])
        except Exception as error:  # told to the others, who would wait for it; raised below
            failure = f"rank {dist.get_rank()}: {type(error).__name__}: {error}"
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (failure, mine))
        for failure, _ in everyone:
            if failure is not None:
                raise RuntimeError(f"sampling failed on {failure}")
        results = {index: completions for _, share in everyone for index, completions in share.items()}
        return [results[index] for index in range(len(work[0]))]

    def _checked(self, prompts: Any, params: Any) -> list[tuple[list[int], SamplingParams]] | ValueError:
        """Token ids and parameters of every prompt; an error is a value here, to be raised on all ranks."""
        try:
            return [(request.prompt, request.params) for request in self.engine.make_requests(prompts, params)]
        except ValueError as error:
            return error

    def _complete(self, work: list[tuple[list[int], SamplingParams]]) -> dict[int, list[Completion]]:
        """This rank's part: takes prompts while its engine has none waiting, steps, until there are no more."""
        engine = self.engine
        order = sorted(range(len(work)), key=lambda index: -_load(*work[index]))
        share = max(1, len(work) // (SHARES_A_RANK * dist.get_world_size()))
        taken: dict[int, Request] = {}
        counter, is_left = _Counter(next(_calls)), True
        try:
            while is_left or engine.has_work:
                while is_left and engine.has_room:
                    first = counter.take(share)
                    for index in order[first : first + share]:
                        taken[index] = engine.submit(*work[index])
                    is_left = first + share < len(work)
                engine.step()
        finally:
            for request in taken.values():
                engine.abort(request)
        for request in taken.values():
            if request.error is not None:
                raise request.error
        return {index: [r.completions[i] for i in range(r.params.n)] for index, r in taken.items()}


class _Counter:
    """A number that all ranks advance, in the store of the process group."""

    def __init__(self, call: int) -> None:
        self._store, self._key = dist.distributed_c10d._get_default_store(), f"m1/replicas/{call}"

    def take(self, amount: int) -> int:
        """Advance by `amount`; returns where it stood."""
        return self._store.add(self._key, amount) - amount


def _load(prompt: list[int], params: SamplingParams) -> int:
    """Tokens to compute, at most."""
    return len(prompt) + params.n * (params.max_tokens or 0)
