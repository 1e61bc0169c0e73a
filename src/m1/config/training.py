"""What the training stages can be told, `m1 select` among them."""

from dataclasses import dataclass, field
from typing import Literal

from m1.config.values import PROBLEM_SUFFIX, DeviceName, ParameterGroup


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
