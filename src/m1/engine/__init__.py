"""Continuous batching for hybrid and dense models: requests join and leave at every step."""

from m1.engine.llm import Engine
from m1.engine.metrics import Metrics
from m1.engine.sampling_params import SamplingParams
from m1.engine.sequence import Completion, Delta

__all__ = ["Completion", "Delta", "Engine", "Metrics", "SamplingParams"]
