"""The directory of a run, from its first step to the model that it becomes.

run.json         command and resolved config, written first: running again must fit it
metrics.jsonl    one line a step
checkpoints/     step-N, the newest few
exports/         step-N, models written on the way where that is asked for
config.json, model.safetensors, tokenizer files, m1_run.json    at the end: the directory is then a model
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from m1.config import SelectConfig, TrainConfig
from m1.distributed import barrier, is_distributed, is_first, on_first
from m1.modeling import M1ForCausalLM
from m1.storage import RUN_RECORD, begin_run, new_directory, require_disk, require_same_run, write_json, write_run_record
from m1.training.sharding import full_parameters

MODEL_CONFIG = "config.json"
# What may change between the start of a run and its resumption: none of it changes the result.
_FREE_TO_CHANGE = (
    *("out", "device", "checkpoint_every", "keep_checkpoints", "async_save", "export_every", "log_every", "track"),
    *("replicate", "reshard_after_forward", "gradient_checkpointing", "timeout", "cache_dir", "teacher_cache", "keep_sampler"),
)


class RunDirectory:
    """The `out` directory of one training command.

    Looking at it changes nothing; `create` makes it, once every input has been found good. Raises FileExistsError for a
    directory with something else in it, ValueError naming the keys in which a run there differs from `config`.
    """

    def __init__(self, command: str, config: TrainConfig | SelectConfig) -> None:
        self.path, self.command, self.config = Path(config.out), command, config
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.checkpoints, self.metrics = self.path / "checkpoints", self.path / "metrics.jsonl"
        require_same_run(self.path, command, _plain(config), free_to_change=_FREE_TO_CHANGE)

    @property
    def is_finished(self) -> bool:
        return (self.path / MODEL_CONFIG).is_file() and (self.path / RUN_RECORD).is_file()

    def create(self, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Make the directory, or go on with the one that is there. The tokenizer goes along with every export."""
        self.tokenizer = tokenizer
        barrier()  # not before every rank has looked at what was there
        on_first(lambda: begin_run(self.path, self.command, _plain(self.config)))

    def export(self, model: M1ForCausalLM, **facts: Any) -> None:
        """Turn the directory into a Hugging Face model: weights in the config's dtype, tokenizer, and `m1_run.json`.

        config.json, without which nothing is taken for a model, arrives last. Raises OSError for a full disk.
        """
        self._write_model(self.path / "export", model, facts)
        on_first(self._move_export)

    def export_step(self, model: M1ForCausalLM, step: int) -> None:
        """Write the model as it is after `step` steps into exports/step-N. Raises OSError for a full disk."""
        self._write_model(self.path / "exports" / f"step-{step:08d}", model, {"step": step})

    def _write_model(self, path: Path, model: M1ForCausalLM, facts: dict[str, Any]) -> None:
        dtype = getattr(torch, self.config.dtype)
        state = {}
        for name, weight in full_parameters(model):  # a tied weight once
            if is_first():  # a divided model may be larger than one device: gathered, it goes to main memory
                state[name] = weight.to("cpu" if is_distributed() else weight.device, dtype)

        def write() -> None:
            require_disk(path.parent, sum(p.numel() * dtype.itemsize for p in model.parameters()), "the trained model")
            with new_directory(path, overwrite=True) as new:
                model.save_pretrained(new, state_dict=state)
                written = json.loads((new / MODEL_CONFIG).read_text(encoding="utf-8"))
                # save_pretrained names the masters' dtype
                write_json(new / MODEL_CONFIG, written | {"dtype": self.config.dtype})
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(new)
                write_run_record(new, self.command, _plain(self.config), **facts)

        on_first(write)

    def _move_export(self) -> None:
        export = self.path / "export"
        for file in sorted(export.iterdir(), key=lambda file: (file.name == MODEL_CONFIG, file.name)):
            file.replace(self.path / file.name)
        export.rmdir()


def _plain(config: TrainConfig | SelectConfig) -> dict[str, Any]:
    """The config as it is after it was written as JSON and read."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
