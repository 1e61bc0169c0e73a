"""What an engine tells about itself while it runs: numbers only."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metrics:
    """A look at the engine. Tokens and seconds count from its start; seconds are those spent in steps."""

    num_running: int
    num_waiting: int
    num_steps: int
    num_preemptions: int
    num_prompt_tokens: int  # of requests taken in
    num_prefix_tokens: int  # of these and of recomputed sequences, what was found in the prefix cache
    num_generated_tokens: int
    seconds: float
    page_use: float  # share of the pages that running sequences hold
    slot_use: float  # the same of slots

    @property
    def tokens_per_second(self) -> float:
        return self.num_generated_tokens / self.seconds if self.seconds else 0.0
