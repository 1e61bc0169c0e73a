"""`m1 select`: which layers of an aligned hybrid become attention again, by greedy restoration (docs/recipes.md).

Starting from the student, each mixer layer in turn gets the teacher's attention back; the one that brings the student's
predictions nearest to the teacher's, by KL on held-out tokens, stays so, and the others are measured again, until enough are
chosen. One model holds both kinds of layers, and a candidate's pass starts at its layer: what comes before is the same.
Under `torchrun` every rank has both models and measures its share of the tokens.
"""

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from m1.config import SelectConfig, require
from m1.distributed import add_over_ranks, is_first, num_ranks, ranks, say, share, sum_over_ranks
from m1.modeling import M1Config, M1ForCausalLM
from m1.modeling.attention import Attention
from m1.modeling.hybrid import HybridBlock
from m1.modeling.loading import load_config, load_model, load_tokenizer
from m1.storage import require_disk, write_json
from m1.training.align import require_same_shape
from m1.training.command import parameter_bytes
from m1.training.data import make_documents
from m1.training.distill import require_same_tokenizer, require_same_vocabulary
from m1.training.loop import autocast
from m1.training.losses import Divergence, head_loss, target_states
from m1.training.packing import Document, PackedBatch, best_fit, pack
from m1.training.run_directory import RunDirectory
from m1.training.sources import read_rows

SELECTION, PLOT = "selection.json", "selection.svg"
TIMEOUT = 600.0  # seconds that a rank waits for the others


@dataclass
class Round:
    """One pick: the KL before it, that with each candidate restored, and the candidate that was chosen."""

    kl_before: float
    kl_of_layer: dict[int, float]

    @property
    def chosen(self) -> int:
        return min(self.kl_of_layer, key=lambda layer: (self.kl_of_layer[layer], layer))


@dataclass
class Selection:
    """Layers that were attention already, and the picks in their order."""

    kept: list[int]
    rounds: list[Round] = field(default_factory=list)

    @property
    def ranking(self) -> list[int]:
        """The layers chosen, the most important first."""
        return [one.chosen for one in self.rounds]

    @property
    def attention_layers(self) -> list[int]:
        return sorted([*self.kept, *self.ranking])

    def as_json(self) -> dict[str, Any]:
        """What `m1 convert --attention-layers` takes as a file, and how it came about."""
        return {
            "attention_layers": self.attention_layers,
            "ranking": [
                {"layer": one.chosen, "kl": one.kl_of_layer[one.chosen], "kl_before": one.kl_before} for one in self.rounds
            ],
            "kept": self.kept,
            "rounds": [dataclasses.asdict(one) for one in self.rounds],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Selection":
        rounds = [
            Round(one["kl_before"], {int(layer): kl for layer, kl in one["kl_of_layer"].items()}) for one in values["rounds"]
        ]
        return cls(values["kept"], rounds)


@contextmanager
def restored(block: HybridBlock, attention: Attention) -> Iterator[None]:
    """Within: the block is attention, with the teacher's."""
    block.self_attn, block.is_mixer = attention, False
    try:
        yield
    finally:
        del block.self_attn
        block.is_mixer = True


def select(
    student: M1ForCausalLM,
    teacher: M1ForCausalLM,
    documents: Sequence[Document],
    count: int,
    *,
    tokens_per_batch: int = 8192,
    precision: str = "bfloat16",
    begun: Selection | None = None,
    on_round: Callable[[Selection], None] = lambda selection: None,
    progress: bool = True,
) -> Selection:
    """Choose mixer layers of `student` until `count` layers are attention, by forward KL at the documents' targets.

    The student becomes the chosen hybrid: its chosen layers hold the teacher's attention itself, and its config says so.
    `begun` is an earlier, shorter selection to go on from; `on_round` is called with the selection after every pick.
    Raises ValueError for models that don't fit together, and a count that leaves nothing to choose.
    """
    require_same_vocabulary(student.config, teacher.config, "the teacher")
    require_same_shape(student.config, teacher.config, "the teacher")
    selection = begun or Selection(list(student.config.attention_layers))
    if not len(selection.kept) < count <= student.config.num_hidden_layers:
        raise ValueError(
            f"count: expected {len(selection.kept) + 1} to {student.config.num_hidden_layers} attention layers, got {count}; "
            f"{len(selection.kept)} of the student's layers are attention already"
        )
    for layer in selection.ranking:
        _restore_for_good(student, teacher, layer)
    lengths = [len(document.token_ids) for document in documents]
    bins = share(best_fit(lengths, max(tokens_per_batch, *lengths)))
    batches = [pack([documents[i] for i in bin_]) for bin_, counts in bins if counts]
    num_rounds, num_mixers = count - len(selection.attention_layers), len(student.config.mixer_layers)
    total = sum(num_mixers - i for i in range(num_rounds)) * len(batches)
    with tqdm(total=total, desc="select", unit="pass", disable=None if progress and is_first() else True) as bar:
        while len(selection.attention_layers) < count:
            selection.rounds.append(_measure(student, teacher, batches, precision, bar))
            _restore_for_good(student, teacher, selection.rounds[-1].chosen)
            bar.set_postfix_str(_describe(selection.rounds[-1]), refresh=False)
            on_round(selection)
    return selection


def _describe(one: Round) -> str:
    return f"layer {one.chosen}: KL {one.kl_before:.4f} -> {one.kl_of_layer[one.chosen]:.4f}"


def _restore_for_good(student: M1ForCausalLM, teacher: M1ForCausalLM, layer: int) -> None:
    """Replace the mixer of `layer` by the teacher's attention, in the student's modules and config."""
    block = student.model.layers[layer]
    assert isinstance(block, HybridBlock) and block.is_mixer
    del block.mixer
    block.self_attn, block.is_mixer = teacher.model.layers[layer].self_attn, False
    types = list(student.config.layer_types)
    types[layer] = teacher.config.layer_types[layer]
    student.config.layer_types = types


@torch.no_grad()
def _measure(
    student: M1ForCausalLM, teacher: M1ForCausalLM, batches: Sequence[PackedBatch], precision: str, bar: tqdm
) -> Round:
    """KL a target token, of the student as it is and with each of its mixer layers restored."""
    layers = student.config.mixer_layers
    sums = torch.zeros(1 + len(layers), dtype=torch.float64, device=student.device)
    for batch in batches:
        with autocast(precision, student.device):
            sums += _divergences(student, teacher, batch.to(student.device), bar)
    targets = sum_over_ranks([sum(batch.num_targets for batch in batches)])[0]
    kl, *of_layers = (add_over_ranks(sums) / targets).tolist()
    return Round(kl, dict(zip(layers, of_layers, strict=True)))


def _divergences(student: M1ForCausalLM, teacher: M1ForCausalLM, batch: PackedBatch, bar: tqdm) -> Tensor:
    """Sums of KL over the batch's targets [1 + mixer layers]: of the student, and with each layer restored."""
    wanted = target_states(teacher, batch)
    model, layout = student.model, batch.layout
    rotary = model.rotary(layout.positions)

    def divergence(hidden: Tensor, branch: Tensor | None, rest: Sequence[nn.Module]) -> Tensor:
        for later in rest:
            hidden, branch = later(hidden, branch, layout, rotary)
        normed, _ = model.norm(branch, hidden)
        return head_loss(Divergence(), (normed[batch.target_positions], student.lm_head.weight), wanted)["kl"]

    hidden, branch, found = model.embed_tokens(batch.input_ids), None, []
    for layer, block in enumerate(model.layers):
        assert isinstance(block, HybridBlock)
        if block.is_mixer:
            with restored(block, teacher.model.layers[layer].self_attn):
                found.append(divergence(hidden, branch, model.layers[layer:]))
            bar.update()
        hidden, branch = block(hidden, branch, layout, rotary)
    return torch.stack([divergence(hidden, branch, ()), *found]).double()


def plot(selection: Selection) -> Figure:
    """What restoring each layer does at the first pick, and how the KL falls pick by pick."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    first, falling = figure.subplots(1, 2, width_ratios=(2, 1))
    one = selection.rounds[0]
    layers = sorted(one.kl_of_layer)
    colors = ["#dd8452" if layer in selection.ranking else "#4c72b0" for layer in layers]
    first.bar(layers, [one.kl_before - one.kl_of_layer[layer] for layer in layers], color=colors)
    first.set(xlabel="layer (orange: chosen)", ylabel="KL removed, nats", title="Restoring one layer's attention")
    kl = [one.kl_before, *(each.kl_of_layer[each.chosen] for each in selection.rounds)]
    falling.plot(range(len(kl)), kl, marker="o", markersize=3)
    for index, layer in enumerate(selection.ranking, start=1):
        falling.annotate(str(layer), (index, kl[index]), textcoords="offset points", xytext=(3, 4), fontsize=7)
    falling.set(xlabel="layers restored", ylabel="KL to the teacher, nats", title="Pick by pick", ylim=(0, None))
    for axes in (first, falling):
        axes.grid(alpha=0.3)
    return figure


def run(config: SelectConfig) -> None:
    """The command: prints the ranking, and writes the list, a plot, and the hybrid with the chosen layers restored."""
    require(config, "model", "teacher", "out")
    count = _count_of(config, load_config(config.model))
    _require_fit(config, load_config(config.model), load_config(config.teacher))
    directory = RunDirectory("select", config)
    if directory.is_finished:
        say(f"{config.out} is finished already: a hybrid. Next: m1 distill --model {config.out} --teacher {config.teacher} …")
        return
    with ranks(config.device, TIMEOUT) as device:
        selection = _select_into(directory, config, count, device)
        say(f"attention stays in layers {', '.join(map(str, selection.attention_layers))}: {directory.path / SELECTION}")
        say(
            f"The hybrid with them restored is {config.out}. Next: m1 distill --model {config.out} --teacher {config.teacher} …"
        )
        say(f"or, to start anew: m1 convert --base {config.teacher} --attention-layers {directory.path / SELECTION} --out …")


def _select_into(directory: RunDirectory, config: SelectConfig, count: int, device: torch.device) -> Selection:
    """Make, or finish, the selection in its directory, with its plot and the hybrid."""
    tokenizer = load_tokenizer(config.model)
    require_same_tokenizer(tokenizer, config.teacher)
    documents = _read_documents(config, tokenizer)
    dtype = getattr(torch, config.dtype)
    require_disk(config.out, parameter_bytes(load_config(config.teacher), dtype.itemsize), "the hybrid")
    student, teacher = (load_model(name, dtype=torch.float32, device=device) for name in (config.model, config.teacher))
    place = f"{num_ranks()} ranks of {device.type}" if num_ranks() > 1 else str(device)
    say(f"m1 select: {count} of {student.config.num_hidden_layers} layers of {config.model} become or stay attention")
    targets = sum(document.num_targets for document in documents)
    say(f"  measured on {targets:,} tokens of {len(documents):,} documents, on {place}")
    directory.create(tokenizer)
    path = directory.path / SELECTION
    begun = Selection.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else None

    def keep(selection: Selection) -> None:
        if is_first():
            write_json(path, selection.as_json())

    options: dict[str, Any] = {"tokens_per_batch": config.tokens_per_batch, "precision": config.precision}
    selection = select(student, teacher, documents, count, **options, begun=begun, on_round=keep)
    for number, one in enumerate(selection.rounds, start=1):
        say(f"{number:3}. {_describe(one)}")
    if is_first():
        plot(selection).savefig(directory.path / PLOT)
    directory.export(_as_hybrid(student), ranking=selection.as_json()["ranking"])
    return selection


def _count_of(config: SelectConfig, student: M1Config) -> int:
    if config.keep is not None:
        return config.keep
    if not 0 < config.attention_fraction <= 1:
        raise ValueError(f"--attention-fraction: expected more than 0 and at most 1, got {config.attention_fraction}")
    return max(1, int(student.num_hidden_layers * config.attention_fraction + 0.5))


def _require_fit(config: SelectConfig, student: M1Config, teacher: M1Config) -> None:
    require_same_vocabulary(student, teacher, config.teacher)
    require_same_shape(student, teacher, config.teacher)
    if teacher.mixer_layers:
        raise ValueError(f"--teacher {config.teacher} has mixers in layers {teacher.mixer_layers}; give the Transformer")
    kept = len(student.attention_layers)
    if not kept < _count_of(config, student) <= student.num_hidden_layers:
        raise ValueError(
            f"--keep: expected {kept + 1} to {student.num_hidden_layers}, got {_count_of(config, student)}; {kept} layers of "
            f"{config.model} are attention already"
        )


def _read_documents(config: SelectConfig, tokenizer: PreTrainedTokenizerBase) -> list[Document]:
    """Documents from the data, in its order, until there are `tokens` targets."""
    rows = read_rows(config.data, num_problems=config.num_problems, seed=config.seed)
    found, targets = [], 0
    for document in make_documents(rows, tokenizer, max_length=config.max_length, suffix=config.suffix):
        found.append(document)
        targets += document.num_targets
        if targets >= config.tokens:
            break
    return found


def _as_hybrid(student: M1ForCausalLM) -> M1ForCausalLM:
    """The student as a model made in its new shape."""
    hybrid = M1ForCausalLM(copy.deepcopy(student.config))
    hybrid.load_state_dict(student.state_dict())
    hybrid.generation_config = student.generation_config
    return hybrid
