"""A trained hybrid as what it differs by from its Transformer: a fraction of its size, for machines that have the latter.

    python -m m1.conversion.difference write models/distilled --base models/qwen --out difference --bits 4
    python -m m1.conversion.difference apply difference --base models/qwen --out models/distilled

Tensors that are the Transformer's are left out. Of a trained one the change is kept, of a new one (a mixer's) the values, in
blocks of 64 along the rows with one scale each: `bits` for changes, 8 for values; vectors and small matrices, such as those of
a mixer's dynamics, as they are. This loses something: `write` says how much, and what that does to the model is to be measured
on the model that `apply` makes.
"""

import argparse
import dataclasses
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from m1.storage import RUN_RECORD, new_directory, write_json

BLOCK = 64  # weights that share a scale
NEW_BITS = 8
SMALL = 2**16  # elements of a matrix below which it is kept as it is
WEIGHTS, FACTS, CONFIG = "difference.safetensors", "difference.json", "config.json"
_GENERATION = "generation_config.json"
_CHANGED, _NEW, _EXACT = "changed", "new", "exact"


@dataclass(frozen=True)
class Loss:
    """What rounding took: tensors kept as changes, as new values and as they are; L2 of the rounding over L2 of the changes
    (of the new values); bytes of the difference."""

    changed: int
    new: int
    exact: int
    error_of_changes: float
    error_of_new: float
    num_bytes: int


def quantize(x: Tensor, bits: int) -> dict[str, Tensor]:
    """x [rows, columns] in `bits` (4 or 8) with a bf16 scale for each `BLOCK` neighbours of a row.

    Returns codes uint8 (two 4-bit codes a byte) and scales [rows, blocks].
    """
    columns = x.shape[1]
    blocks = torch.nn.functional.pad(x.float(), (0, -columns % BLOCK)).unflatten(1, (-1, BLOCK))
    most = 2 ** (bits - 1) - 1
    scales = (blocks.abs().amax(-1) / most).clamp_min(1e-30).bfloat16()
    codes = (blocks / scales.float()[..., None]).round().clamp(-most, most).to(torch.int8).flatten(1) + most
    codes = codes.to(torch.uint8)
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return {"codes": codes.contiguous(), "scales": scales}


def dequantize(codes: Tensor, scales: Tensor, columns: int, bits: int) -> Tensor:
    """What `quantize` was given, fp32 [rows, columns], up to rounding."""
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(1)
    values = codes.float() - (2 ** (bits - 1) - 1)
    return (values.unflatten(1, (-1, BLOCK)) * scales.float()[..., None]).flatten(1)[:, :columns]


def write_difference(model: str | Path, base: str | Path, out: str | Path, *, bits: int = 8) -> Loss:
    """Write into `out` what `apply_difference` needs beside `base` to make `model` again, nearly.

    Raises FileNotFoundError for a directory without weights, ValueError for other bits than 4 and 8.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits}")
    theirs, mine = _Weights(base), _Weights(model)
    kept: dict[str, Tensor] = {}
    kinds: dict[str, dict] = {}
    squares = {kind: [0.0, 0.0] for kind in (_CHANGED, _NEW)}  # of what rounding took, of what there was
    for name in mine.names:
        weight = mine.get(name)
        before = theirs.get(name) if name in theirs.names else None
        is_known = before is not None and before.shape == weight.shape
        if before is not None and is_known and torch.equal(weight, before.to(weight.dtype)):
            continue
        kind = _CHANGED if is_known else _NEW
        if weight.ndim != 2 or weight.numel() < SMALL:
            kinds[name], kept[name] = {"kind": _EXACT}, weight
            continue
        wanted = weight.float() - before.float() if before is not None and is_known else weight.float()
        num_bits = bits if is_known else NEW_BITS
        parts = quantize(wanted, num_bits)
        lost = dequantize(**parts, columns=wanted.shape[1], bits=num_bits) - wanted
        for index, tensor in enumerate((lost, wanted)):
            squares[kind][index] += float(tensor.double().square().sum())
        kinds[name] = {"kind": kind, "bits": num_bits, "columns": wanted.shape[1]}
        kept |= {f"{name}:{part}": tensor for part, tensor in parts.items()}
    errors = {kind: (lost / all_) ** 0.5 if all_ else 0.0 for kind, (lost, all_) in squares.items()}
    counts = Counter(entry["kind"] for entry in kinds.values())
    loss = Loss(
        changed=counts[_CHANGED],
        new=counts[_NEW],
        exact=counts[_EXACT],
        error_of_changes=errors[_CHANGED],
        error_of_new=errors[_NEW],
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in kept.values()),
    )
    with new_directory(out) as directory:
        save_file(kept, directory / WEIGHTS)
        for file in (CONFIG, _GENERATION, RUN_RECORD):
            if (Path(model) / file).is_file():
                shutil.copy(Path(model) / file, directory / file)
        facts = {"base": theirs.checksum(), "tensors": kinds, "names": mine.names, "loss": dataclasses.asdict(loss)}
        write_json(directory / FACTS, facts)
    return loss


def apply_difference(difference: str | Path, base: str | Path, out: str | Path) -> Path:
    """Make the model of a difference in `out`: its weights in bf16, its config, the tokenizer of `base`.

    Raises FileNotFoundError for what is not there, ValueError if `base` is not the model that the difference is to.
    """
    path = Path(difference)
    if not (path / FACTS).is_file():
        raise FileNotFoundError(f"{path}: no {FACTS} in it; expected a directory that `write` made")
    facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    theirs = _Weights(base)
    if theirs.checksum() != facts["base"]:
        raise ValueError(f"--base {base}: not the model that {difference} is the difference to: its weights differ")
    state = {}
    with safe_open(path / WEIGHTS, framework="pt") as kept:
        for name in facts["names"]:
            entry = facts["tensors"].get(name)
            if entry is None:
                state[name] = theirs.get(name)
            elif entry["kind"] == _EXACT:
                state[name] = kept.get_tensor(name)
            else:
                parts = {part: kept.get_tensor(f"{name}:{part}") for part in ("codes", "scales")}
                value = dequantize(**parts, columns=entry["columns"], bits=entry["bits"])
                state[name] = value + theirs.get(name).float() if entry["kind"] == _CHANGED else value
    with new_directory(out) as directory:
        state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
        save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
        known = {CONFIG, _GENERATION, RUN_RECORD}
        for file in sorted(Path(base).iterdir()):
            if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
                source = path / file.name if file.name in known else file
                if source.is_file():
                    shutil.copy(source, directory / file.name)
    return Path(out)


class _Weights:
    """The tensors of a model directory, read one at a time."""

    def __init__(self, directory: str | Path) -> None:
        files = sorted(Path(directory).glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{directory}: no safetensors in it; expected a model directory")
        self._place = {name: file for file in files for name in _names_in(file)}
        self.names = sorted(self._place)

    def get(self, name: str) -> Tensor:
        with safe_open(self._place[name], framework="pt") as file:
            return file.get_tensor(name)

    def checksum(self) -> str:
        """Tells models apart by the sum and the first values of every tensor: cheap, and the same for equal weights."""
        parts = []
        for name in self.names:
            tensor = self.get(name)
            parts.append(f"{name} {list(tensor.shape)} {tensor.flatten()[:4].tolist()} {float(tensor.double().sum()):.10g}")
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _names_in(path: Path) -> Iterator[str]:
    with safe_open(path, framework="pt") as file:
        yield from file.keys()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    write = actions.add_parser("write", help="a model's difference to its Transformer")
    write.add_argument("model")
    write.add_argument("--bits", type=int, default=8, help="of a changed weight: 4 or 8")
    apply = actions.add_parser("apply", help="the model again")
    apply.add_argument("difference")
    for action in (write, apply):
        action.add_argument("--base", required=True, help="the Transformer's directory")
        action.add_argument("--out", required=True)
    given = parser.parse_args(arguments)
    if given.action == "apply":
        print(f"The model is in {apply_difference(given.difference, given.base, given.out)}")
        return
    loss = write_difference(given.model, given.base, given.out, bits=given.bits)
    counts = f"{loss.changed} changed tensors, {loss.new} new, {loss.exact} as they are"
    print(f"{loss.num_bytes / 1e6:.1f} MB in {given.out}: {counts}")
    print(f"rounding took {loss.error_of_changes:.2%} of the changes and {loss.error_of_new:.2%} of the new values (L2)")


if __name__ == "__main__":
    main()
