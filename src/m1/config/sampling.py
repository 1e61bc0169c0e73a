"""What the commands can be told that sample a model: to make data, to solve, to evaluate."""

from dataclasses import dataclass, field
from typing import Literal

from m1.config.values import PROBLEM_SUFFIX, DeviceName


@dataclass(kw_only=True)
class SampleConfig:
    """Make training data: sample a model on many problems, check the answers, write compressed JSON lines."""

    model: str = ""
    """Model that is sampled, usually the teacher: a directory or hub name, hybrid or Transformer."""
    out: str = ""
    """Directory to write; give it to a training stage as --data. Run again to go on, or with more --samples for more."""
    data: list[str] = field(default_factory=list)
    """Problem sets: JSON-lines files or `datasets` names with problem and answer, or reasoning-gym generators as gym:NAME."""
    num_problems: int = 1000
    """How many problems to draw from each reasoning-gym generator."""
    invent: int = 0
    """How many problems the model invents itself, from nothing but the beginning of a user's turn. They have no answer."""
    invent_system: str = ""
    """System message under which it invents them, to steer them, such as "You solve mathematical problems."; empty for none."""
    samples: int = 4
    """Completions a problem."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability."""
    max_new_tokens: int = 1024
    """Longest completion."""
    suffix: str = PROBLEM_SUFFIX
    """Added to every problem that has an answer; empty for none."""
    reward: str = "auto"
    """What checks an answer. auto: the problem's own (a reasoning-gym checker, or equality of answers). Or MODULE:FUNCTION."""
    token_ids: bool = False
    """Write the tokens of each completion too."""
    log_probs: bool = False
    """Write the tokens and their log-probabilities at the sampling temperature too."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of generated problems and of the sampling."""


@dataclass(kw_only=True)
class SamplingConfig:
    """What every command has that samples a model: which model, by what, and how."""

    model: str = ""
    """Model directory or hub name, hybrid or Transformer; with --url, the name that the server knows."""
    backend: Literal["engine", "transformers", "vllm", "server"] = "engine"
    """What samples: M1's engine, transformers' generate (slow), vLLM if it is installed, or a server at --url."""
    url: str = ""
    """Address of a server that speaks OpenAI's protocol, http://HOST:PORT/v1; the key is taken from OPENAI_API_KEY."""
    concurrency: int = 0
    """Samples that run at once; 0: as many as the backend finds good, fewer under a time budget, since fewer end sooner."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """What the engine keeps a mixer's SSM states in; bfloat16 halves them, and what a step reads of them."""
    quantization: Literal["none", "fp8"] = "none"
    """fp8: the engine multiplies 8-bit weights and keeps 8-bit keys and values, 16-bit states; it saves time on a GPU only."""
    logprobs: bool = True
    """Ask a server for log-probs; only votes weighted by them need these."""
    samples: int = 0
    """Solutions to sample for a problem; 0: the command's default, or as many as a budget has room for."""
    temperature: float = 0.7
    """Sampling temperature."""
    top_p: float = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability."""
    adaptive: float = 0.0
    """Stop when the vote is decided with this probability (0.95, say; 1: only when it can't be overtaken); 0: never."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of the sampling."""


@dataclass(kw_only=True)
class SolveConfig(SamplingConfig):
    """Sample many solutions of a problem and vote."""

    problem: str = ""
    """The problem, in words; - reads it from standard input."""
    seconds: float = 0.0
    """Sample for so many seconds, then vote on what has finished; 0: no limit."""
    tokens: int = 0
    """Sample until so many tokens are generated, then vote on what has finished; 0: no limit."""
    vote: str = "majority"
    """majority; logprob or tail: weighted by the mean log-prob of all or of the last tokens; MODULE:FUNCTION: by a verifier's
    score of (problem, solution). best-logprob, best-tail, best-MODULE:FUNCTION: the best sample alone decides."""
    max_new_tokens: int = 1024
    """Longest solution."""
    suffix: str = PROBLEM_SUFFIX
    """Added to the problem; empty for none."""
    json: bool = False
    """Print one JSON object instead of text."""


@dataclass(kw_only=True)
class EvalConfig(SamplingConfig):
    """Measure a model on benchmarks: pass@k, votes, lengths; every completion is recorded. Run again to go on after a kill."""

    tasks: str = "math500"
    """Benchmarks, with commas: math500, aime24, aime25, amc23, olympiadbench, gsm8k, …, JSON-lines files, gym:GENERATOR."""
    out: str = ""
    """Directory for records and results; runs/eval/ and the model's name unless given."""
    data_dir: str = ""
    """Directory with the benchmarks as JSON lines, instead of downloading them."""
    limit: int = 0
    """Only the first so many problems of each benchmark; 0: all."""
    time_budgets: str = ""
    """Seconds, with commas: sample each problem alone for the longest, and report the vote at each: 1,2,5,10."""
    token_budgets: str = ""
    """The same for generated tokens: 1000,4000,16000."""
    max_new_tokens: int = 32768
    """Longest solution; the model's own limit if that is less."""
    verifier: str = ""
    """MODULE:FUNCTION that scores (problem, solution), for votes weighted by it; at least 0, or only the best counts."""
    suffix: str | None = None
    """Added to each problem; the benchmark's own (the M1 paper's) unless given; empty for none."""
    regrade: str = ""
    """Sample nothing: judge the completions in this directory of an evaluation again, and write what is found to --out."""
    overwrite: bool = False
    """Start anew even if the output directory holds records."""
