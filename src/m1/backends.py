"""Models as `generate` callables: what evaluation and voting know of a model. Each backend is one function here."""

from collections.abc import Mapping
from typing import Any

from m1.engine.llm import Engine
from m1.engine.sampling_params import SamplingParams
from m1.evaluation.runner import Generate, Prompt, Sample


def engine_backend(engine: Engine, *, progress: bool = False) -> Generate:
    """The engine of this project. `params` are `SamplingParams` fields other than n."""

    def generate(prompts: list[Prompt], n: int, params: Mapping[str, Any]) -> list[list[Sample]]:
        completions = engine.generate(list(prompts), SamplingParams(n=n, **params), progress=progress)
        return [
            [
                Sample(
                    text=one.text,
                    num_tokens=len(one.token_ids),
                    finish_reason=one.finish_reason,
                    mean_logprob=sum(one.logprobs) / len(one.logprobs) if one.logprobs else None,
                )
                for one in of_prompt
            ]
            for of_prompt in completions
        ]

    return generate
