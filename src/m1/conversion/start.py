"""The improved start: a mixer that begins near the attention layer it replaces, in closed form.

What M1 leaves at random is set so that the mixer is linear attention with decay and nothing else: open gate, identity
convolution, no skip, rotated B and C, constant step sizes. Then, on some text, each head's half-life is chosen and the
output projection fitted by least squares to what attention gave on the same inputs. At last weights are made of one size, for
the optimizer's sake. No gradient is taken and no text read here. Sources: MOHAWK (arXiv 2408.10189) and its successors for the
identity start; the fit is ordinary ridge regression.
Legend: T flat tokens, H mixer heads (mamba1: heads of width d_state), P head width, D hidden size.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from m1.conversion.weights import in_proj_slices, output_order
from m1.modeling import M1ForCausalLM, SequenceLayout
from m1.modeling.aligned_linear import split_rows
from m1.modeling.mamba1 import Mamba1Mixer, inverse_softplus
from m1.modeling.mamba2 import Mamba2Mixer

Mixer = Mamba1Mixer | Mamba2Mixer

OPEN_GATE = 1.2784645  # silu(OPEN_GATE) = 1
HALF_LIVES = (2.0, 8.0, 32.0, 128.0, 512.0, 2048.0)  # tokens, tried for every head
UNFITTED_HALF_LIVES = (4.0, 512.0)
SEARCH_TOKENS = 1024  # half-lives differ by far more than this many tokens' noise
# The fitted projection is drawn to the scaled one as by this many average tokens a channel. On SmolLM2-135M it is within
# 1 % of the best held-out error for 256 to 6,144 tokens.
RIDGE_TOKENS_PER_CHANNEL = 2.0
HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class LayerFit:
    """How near one mixer comes to its attention layer: L2 of the difference over L2 of attention's output.

    Measured on documents that the fit did not see, where there are enough of them (`is_held_out`).
    """

    layer: int
    error_before: float
    error_after: float
    is_held_out: bool
    half_lives: list[float]


def improved_options(mixer: str) -> dict[str, Any]:
    """The fields of `M1Config` that the improved start needs."""
    options: dict[str, Any] = {"mixer_bias": True, "mixer_rope": True, "conv_activation": None}
    return options | ({"output_norm": False} if mixer == "mamba2" else {})


@torch.no_grad()
def open_mixer(mixer: Mixer) -> None:
    """Make a mixer that has attention's weights linear attention with decay, in place.

    q is scaled by head_dim ** -0.5 as attention's scores are. Half-lives are spread log-evenly over the heads, so that each
    query head has short and long ones. Raises ValueError if its config lacks the options of `improved_options`.
    """
    config = mixer.config
    for name, value in improved_options(config.mixer).items():
        if getattr(config, name) != value:
            raise ValueError(f"config.{name}: the improved start needs {value!r}, got {getattr(config, name)!r}")
    rows = in_proj_slices(config)
    mixer.in_proj.weight[rows["z"]] = 0
    mixer.in_proj.bias[rows["z"]] = OPEN_GATE
    if config.qk_norm:
        mixer.q_norm.weight *= config.head_dim**-0.5
    else:
        mixer.in_proj.weight[rows["C"]] *= config.head_dim**-0.5
        mixer.in_proj.bias[rows["C"]] *= config.head_dim**-0.5
    for parameter in mixer.conv1d.parameters():
        parameter.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1
    mixer.D.zero_()
    mixer.A_log.zero_()
    # One of the two factors of mamba1's low-rank step sizes stays random, so that a gradient reaches the other.
    if isinstance(mixer, Mamba1Mixer):
        mixer.dt_proj.weight.zero_()
    else:
        mixer.in_proj.weight[rows["dt"]] = 0
    shortest, longest = UNFITTED_HALF_LIVES
    golden = (math.sqrt(5) - 1) / 2  # its multiples fill the unit interval evenly, neighbours far apart
    places = torch.arange(mixer.num_heads, dtype=torch.float64) * golden % 1
    set_half_lives(mixer, (shortest * (longest / shortest) ** places).float())


@torch.no_grad()
def set_half_lives(mixer: Mixer, half_lives: Tensor) -> None:
    """Step sizes by which a head forgets half in `half_lives` [H] tokens; A must be -1, so that decay = exp(-step)."""
    steps = inverse_softplus(math.log(2) / half_lives)
    if isinstance(mixer, Mamba1Mixer):
        mixer.dt_proj.bias.copy_(steps.repeat_interleave(mixer.config.d_state))
    else:
        mixer.dt_bias.copy_(steps)


@torch.no_grad()
def balance(mixer: Mixer) -> None:
    """Give x, B, C and `out_proj` of each head weights of one size, in place; what an opened mixer computes stays the same.

    Attention normalises q.k, a mixer doesn't: after the fit, C and `out_proj` of large heads are a hundred times smaller than B
    and x, and Adam, whose first steps are as large for small weights as for others, would undo the start at once. The output
    is linear in each of the four, so factors whose product is 1 can be moved between them: a for x and b for B of a
    key/value head, c for C and o for the columns of each of its query heads. With q and k normed, B and C have no scale.
    """
    config, rows = mixer.config, in_proj_slices(mixer.config)
    groups, width = config.num_key_value_heads, config.head_dim
    columns = output_order(config).to(mixer.out_proj.weight.device).argsort()  # in attention's order: head after head
    x, B, C = (_sizes(mixer.in_proj.weight[rows[name]], groups, width) for name in ("x", "B", "C"))  # [G, 1 or heads a group]
    out = _sizes(mixer.out_proj.weight[:, columns].T, groups, width)
    if config.qk_norm:
        size = (x * _geometric_mean(out)).sqrt()
        factors = {"x": size / x}
        outwards = (x / size).expand_as(out)
    else:
        size = (x * B * _geometric_mean(C * out)) ** 0.25
        factors = {"x": size / x, "B": size / B}
        of_both = (C * out * x * B).sqrt() / size  # what C and out of a head shall have, so that all factors cancel
        factors["C"], outwards = of_both / C, of_both / out
    for name, factor in factors.items():
        factor = factor.flatten().repeat_interleave(width)
        mixer.in_proj.weight[rows[name]] *= factor[:, None]
        mixer.in_proj.bias[rows[name]] *= factor
    mixer.out_proj.weight[:, columns] *= outwards.flatten().repeat_interleave(width)


def _sizes(weight: Tensor, groups: int, width: int) -> Tensor:
    """Root mean square of each head's rows; weight [heads * width, D] -> [groups, heads a group]."""
    return weight.unflatten(0, (groups, -1, width)).square().mean((2, 3)).sqrt().clamp_min(1e-12)


def _geometric_mean(x: Tensor) -> Tensor:
    """Over a group's heads: [G, heads] -> [G, 1]."""
    return x.log().mean(1, keepdim=True).exp()


@torch.no_grad()
def fit_mixers(
    dense: M1ForCausalLM,
    mixers: Mapping[int, Mixer],
    documents: list[list[int]],
    *,
    on_layer: Callable[[LayerFit], None] = lambda fit: None,
) -> list[LayerFit]:
    """Fit opened mixers (fp32, by layer) to the attention of `dense` on token ids; changes the mixers, not `dense`.

    They must not be balanced yet: the fit starts from attention's own `o_proj`.
    Every layer sees the inputs that it has in `dense`. One document in five is held out to measure the errors on, where there
    are five. `on_layer` is called after each.
    """
    fits = []
    for record in _attention_of_layers(dense, documents):
        if record.layer in mixers:
            fits.append(_fit(mixers[record.layer], record))
            on_layer(fits[-1])
    return fits


@torch.no_grad()
def relative_errors(dense: M1ForCausalLM, mixers: Mapping[int, Mixer], documents: list[list[int]]) -> dict[int, float]:
    """L2 of (mixer - attention) over L2 of attention, by layer, each on the inputs that the layer has in `dense`."""
    errors = {}
    for record in _attention_of_layers(dense, documents):
        if record.layer in mixers:
            mixer = mixers[record.layer]
            given = mixer(record.x, record.layout, record.rotary)
            errors[record.layer] = _distance(
                given if mixer.out_proj.bias is None else given - mixer.out_proj.bias, record.output
            )
    return errors


@dataclass(frozen=True)
class _AttentionRecord:
    """What an attention layer did, fp32: input x [T, D], heads before o_proj [T, d_inner], output without bias [T, D]."""

    layer: int
    x: Tensor
    heads: Tensor
    output: Tensor
    layout: SequenceLayout
    rotary: tuple[Tensor, Tensor]


def _attention_of_layers(dense: M1ForCausalLM, documents: list[list[int]]) -> Iterator[_AttentionRecord]:
    """Run the dense model once and yield each layer's record."""
    device = dense.model.embed_tokens.weight.device
    layout = SequenceLayout.from_lengths([len(ids) for ids in documents], device)
    rotary = dense.model.rotary(layout.positions)
    hidden = dense.model.embed_tokens(torch.tensor([token for ids in documents for token in ids], device=device))
    branch = None
    for layer, block in enumerate(dense.model.layers):
        with _inputs_of(block.self_attn, block.self_attn.o_proj) as seen:
            hidden, branch = block(hidden, branch, layout, rotary)
        x, heads = (tensor.float() for tensor in seen)
        output = nn.functional.linear(heads, block.self_attn.o_proj.weight.float())
        yield _AttentionRecord(layer, x, heads, output, layout, rotary)


@contextmanager
def _inputs_of(*modules: nn.Module) -> Iterator[list[Tensor]]:
    """While open, the first argument of each call of a module is appended to the list, in the order of the calls."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0])) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _distance(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def _fit(mixer: Mixer, record: _AttentionRecord) -> LayerFit:
    """Choose the mixer's half-lives and output projection; see `fit_mixers`."""
    bounds = record.layout.cu_seqlens.tolist()
    documents = [slice(start, end) for start, end in itertools.pairwise(bounds)]
    held_out = documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    fitted = [document for document in documents if document not in held_out]
    target = record.heads[:, output_order(mixer.config).to(record.heads.device)].unflatten(-1, (mixer.num_heads, -1))

    default = _half_lives_of(mixer)
    heads = _linear_attention(mixer, record, documents, default)
    measured = torch.cat([torch.arange(d.start, d.stop) for d in held_out or fitted]).to(heads.device)
    before = _distance(_project(mixer, heads[measured]), record.output[measured])

    num_searched = next((i for i, end in enumerate(bounds) if end >= SEARCH_TOKENS), len(documents))
    half_lives = _choose_half_lives(mixer, record, documents[:num_searched], target)
    set_half_lives(mixer, half_lives)
    heads = _linear_attention(mixer, record, documents, half_lives)
    rows = torch.cat([torch.arange(d.start, d.stop) for d in fitted]).to(heads.device)
    _fit_output(mixer, heads[rows], target[rows], record.output[rows])
    after = _distance(_project(mixer, heads[measured]), record.output[measured])
    return LayerFit(record.layer, before, after, bool(held_out), half_lives.tolist())


def _project(mixer: Mixer, heads: Tensor) -> Tensor:
    return nn.functional.linear(heads.flatten(1), mixer.out_proj.weight)


def _half_lives_of(mixer: Mixer) -> Tensor:
    """The half-lives [H] that `set_half_lives` has set."""
    biases = mixer.dt_proj.bias[:: mixer.config.d_state] if isinstance(mixer, Mamba1Mixer) else mixer.dt_bias
    return math.log(2) / nn.functional.softplus(biases)


def _linear_attention(mixer: Mixer, record: _AttentionRecord, documents: list[slice], half_lives: Tensor) -> Tensor:
    """What an opened mixer hands to `out_proj` [T, H, P] for documents that follow one another from the first on.

    The scan with constant steps in its attention form (arXiv 2405.21060 §3): y_t = sum_s step exp(-step (t - s)) (C_t.B_s) x_s,
    quadratic in the document's length and, at these lengths, much quicker on a CPU than the scan.
    """
    num_tokens = documents[-1].stop
    rotary = (record.rotary[0][:num_tokens], record.rotary[1][:num_tokens])
    _, v, k, q, _ = split_rows(mixer.in_proj(record.x[:num_tokens]), mixer.splits)
    v, k, q = mixer.split_heads(v, k, q, rotary)
    repeats = q.shape[1] // k.shape[1]
    v, k = (t.repeat_interleave(repeats, dim=1) for t in (v, k))
    steps = math.log(2) / half_lives  # [H]
    heads = []
    for document in documents:
        C, B, x = (t[document].transpose(0, 1) for t in (q, k, v))  # [H, L, N or P]
        places = torch.arange(C.shape[1], device=C.device)
        distance = (places[:, None] - places).float()  # [L, L]
        decay = torch.where(distance >= 0, (-distance.clamp_min(0) * steps[:, None, None]).exp(), 0.0)
        heads.append(((C @ B.transpose(1, 2)) * decay @ x * steps[:, None, None]).transpose(0, 1))
    return torch.cat(heads)


def _choose_half_lives(mixer: Mixer, record: _AttentionRecord, documents: list[slice], target: Tensor) -> Tensor:
    """For each head the half-life with which its output is nearest to attention's in direction; [H]."""
    target = target[: documents[-1].stop]
    cosines = []
    for half_life in HALF_LIVES:
        heads = _linear_attention(mixer, record, documents, target.new_full((mixer.num_heads,), half_life))
        cosines.append((heads * target).sum((0, 2)) / heads.square().sum((0, 2)).sqrt().clamp_min(1e-20))
    return target.new_tensor(HALF_LIVES)[torch.stack(cosines).argmax(0)]


def _fit_output(mixer: Mixer, heads: Tensor, target: Tensor, output: Tensor) -> None:
    """Set `out_proj` so that heads [T, H, P] give output [T, D]: o_proj scaled a head, plus what ridge regression adds.

    Scale of a head: <y, a> / <y, y>, with target a [T, H, P]. Then W = W_scaled + E, with E minimising |Y E' - rest|^2 +
    ridge |E|^2 over the scaled heads Y, so that a head that attention barely uses stays small.
    """
    scales = (heads * target).sum((0, 2)) / heads.square().sum((0, 2)).clamp_min(1e-20)
    y = (heads * scales[:, None]).flatten(1)  # [T, d_inner]
    projection = mixer.out_proj.weight
    rest = output - nn.functional.linear(y, projection)
    gram = y.T @ y
    gram.diagonal().add_(RIDGE_TOKENS_PER_CHANNEL * y.shape[1] * gram.diagonal().mean() / y.shape[0])
    correction = torch.linalg.solve(gram.double(), (y.T @ rest).double()).float().T
    projection.copy_((projection + correction) * scales.repeat_interleave(heads.shape[2]))
