"""Runs in processes of their own: of every stage on several ranks that talk over gloo, as `torchrun` would start them, and
runs in a directory that are killed and resumed."""

import json
import multiprocessing
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from m1.config import AlignConfig, DistillConfig, GRPOConfig, OnPolicyConfig, SFTConfig
from m1.distributed import is_first, local_device, rank
from m1.distributed import ranks as process_group
from m1.modeling import M1ForCausalLM
from m1.modeling.aligned_linear import AlignedLinear
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Score
from m1.training.align import align
from m1.training.distill import distill
from m1.training.grpo import grpo
from m1.training.loop import train
from m1.training.on_policy import distill_on_policy
from m1.training.optimizer import select_trainable
from m1.training.run_directory import RunDirectory
from m1.training.select import Selection, select
from m1.training.sft import SFTStage, sft
from m1.training.sharding import full_parameters, shard_model
from m1.training.teacher_cache import CachedTeacher, TeacherCache
from tests.training import tiny

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.training.ranks"])  # torch is imported once, processes are forked from there

# 5 micro-batches a step: on two ranks, one of them has a batch that does not count.
SIZES: dict[str, Any] = {
    "steps": 4,
    "tokens_per_step": 150,
    "tokens_per_batch": 30,
    "max_length": 30,
    "learning_rate": 1e-2,
    "warmup_steps": 2,
    "precision": "float32",
    "device": "cpu",
    "timeout": 60.0,
    "replicate": "never",
}
# A run in a directory: fast steps, a checkpoint at each.
RUN: dict[str, Any] = {
    **SIZES,
    "steps": 20,
    "tokens_per_step": 60,
    "checkpoint_every": 1,
    "dtype": "float32",
    "frozen": ["norms"],
}
BEGUN = "begun"  # a file in a run's directory, there once training begins
# name -> (stage, fields of its config, fields of the model)
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "align": ("align", {"learning_rate": 0.0}, {}),
    "align, mamba2, bf16, teacher divided": (
        "align",
        {"learning_rate": 0.0, "precision": "bfloat16", "shard_teacher": True},
        {"mixer": "mamba2"},
    ),
    "distill, teacher divided": ("distill", {"shard_teacher": True, "ce_weight": 0.2}, {}),
    "distill, mamba2, embeddings and attention frozen": (
        "distill",
        {"frozen": ["embeddings", "attention"], "max_grad_norm": 0.1},
        {"mixer": "mamba2"},
    ),
    "distill, bf16": ("distill", {"precision": "bfloat16"}, {}),
    "sft, tied embeddings": ("sft", {}, {}),
    "sft, untied, biases, averaged": ("sft", {"ema_decay": 0.5}, {"tie_word_embeddings": False, "mixer_bias": True}),
    "sft, recomputed, kept gathered, bf16": (
        "sft",
        {"gradient_checkpointing": True, "reshard_after_forward": False, "precision": "bfloat16"},
        {"mixer": "mamba2"},
    ),
    "align, replicated": ("align", {"learning_rate": 0.0, "replicate": "always"}, {}),
    "distill, bf16, replicated": ("distill", {"precision": "bfloat16", "replicate": "always"}, {}),
    "sft, untied, biases, averaged, replicated": (
        "sft",
        {"ema_decay": 0.5, "replicate": "always"},
        {"tie_word_embeddings": False, "mixer_bias": True},
    ),
    "grpo, replicated": ("grpo", {"replicate": "always"}, {}),
    "distill, cached teacher": ("distill", {"teacher_cache": "cache", "steps": 6}, {"mixer": "mamba2"}),
    "grpo": ("grpo", {}, {}),
    "grpo, mamba2, two updates, refilled, kl": (
        "grpo",
        {"updates_per_step": 2, "refill": 3.0, "kl_weight": 0.1, "learning_rate": 2e-3},
        {"mixer": "mamba2"},
    ),
    "on-policy, teacher divided": ("on-policy", {"shard_teacher": True}, {}),
    "on-policy, mamba2": ("on-policy", {}, {"mixer": "mamba2"}),
}
# Three problems a step: one rank samples two of them, the other one.
ROLLOUTS: dict[str, Any] = {"problems_per_step": 3, "samples_per_problem": 4, "max_new_tokens": 5}
PROMPTS = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]


class OddTokens:
    """A scorer that likes completions whose number of words is odd."""

    def score_many(self, problems: list[Problem], completions: list[str]) -> list[Score]:
        return [Score(float(len(text.split()) % 2), None) for text in completions]


def cached(teacher: M1ForCausalLM, directory: Path) -> CachedTeacher:
    """The teacher by its eight most probable tokens, from a cache that is empty at first: later epochs read it."""
    facts = {"teacher": "tiny", "vocab_size": 67, "top_k": 8, "temperature": 1.0}
    return CachedTeacher(
        lambda: teacher, teacher.config, TeacherCache(directory, facts), temperature=1.0, precision=SIZES["precision"]
    )


def run_case(name: str, out: Path, device_name: str = "cpu") -> None:
    """Run a case on however many ranks there are; the first writes its weights and metrics into `out`."""
    stage, fields, of_model = CASES[name]
    fields, device = fields | {"device": device_name}, local_device(device_name)
    student = tiny.model(attention=(1,), layers=3, **of_model).to(device)
    teacher = tiny.model(attention=(0, 1, 2), layers=3, seed=1).to(device)
    if stage != "sft":
        student.load_state_dict(teacher.state_dict(), strict=False)
    documents = tiny.documents(40)
    if fields.get("shard_teacher"):
        shard_model(teacher.requires_grad_(False), precision="float32")
    if stage == "align":
        result = align(student, teacher, documents, AlignConfig(**SIZES | fields), progress=False)
    elif stage == "distill":
        source = cached(teacher, out / fields["teacher_cache"]) if "teacher_cache" in fields else teacher
        result = distill(student, source, documents, DistillConfig(**SIZES | fields), progress=False)
    elif stage == "grpo":
        tokenizer = tiny.word_tokenizer(" ".join(f"w{i}" for i in range(1, 67)))
        problems = [Problem(str(ids), tokenizer.decode(ids), "") for ids in PROMPTS]
        config = GRPOConfig(**SIZES | ROLLOUTS | {"suffix": ""} | fields)
        result = grpo(student, tokenizer, problems, config, scorer=OddTokens(), progress=False)
    elif stage == "on-policy":
        config = OnPolicyConfig(**SIZES | ROLLOUTS | fields)
        result = distill_on_policy(student, teacher, None, PROMPTS, config, progress=False)
    else:
        result = sft(student, documents, SFTConfig(**SIZES | fields), progress=False)
    weights = {name: tensor.clone() for name, tensor in full_parameters(student)}
    if is_first():
        save_file(weights, out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(result.metrics))


def run_cases(names: Sequence[str], out: Path, device_name: str = "cpu") -> None:
    for name in names:
        run_case(name, out, device_name)


def run_padded_cases(names: Sequence[str], out: Path) -> None:
    """With rows of `in_proj` padded, as they are on a GPU. In a process of its own: nothing is put back."""
    AlignedLinear.is_padding = staticmethod(lambda x: True)  # type: ignore[method-assign]
    run_cases(names, out)


def run_select(out: Path, device_name: str = "cpu") -> Selection:
    """A selection of two layers on however many ranks there are; each writes what it chose into `out`."""
    device = local_device(device_name)
    student, teacher = (
        tiny.model(attention=(), layers=4).to(device),
        tiny.model(attention=range(4), layers=4, seed=1).to(device),
    )
    student.load_state_dict(teacher.state_dict(), strict=False)
    selection = select(student, teacher, tiny.documents(9), 2, tokens_per_batch=40, precision="float32", progress=False)
    (out / f"selection-{rank()}.json").write_text(json.dumps(selection.as_json()))
    return selection


def read_case(name: str, out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    return load_file(out / f"{name}.safetensors"), json.loads((out / f"{name}.json").read_text())


def run_sft(out: Path, fields: dict[str, Any], stage: type[SFTStage] = SFTStage) -> None:
    """A run of `m1 sft` in `out`, begun or resumed, to the exported model."""
    config = SFTConfig(out=str(out), **RUN | fields)
    model = tiny.model().to(local_device(config.device))
    select_trainable(model, config.frozen)
    directory = RunDirectory("sft", config)
    directory.create()
    (out / BEGUN).touch()
    train(model, stage(model, tiny.documents(20), config), config, directory=directory, progress=False)
    directory.export(model)


def weights_of(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "model.safetensors")


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(
    count: int, act: Callable[..., None], *arguments: Any, has_group: bool = True, device: str = "cpu"
) -> list[Any]:
    """Processes that call `act(*arguments)` as ranks of `torchrun`, in their process group if `has_group`.

    device: "cuda" gives each rank a GPU of its own, and NCCL.
    """
    port = free_port()
    processes = [
        CONTEXT.Process(target=_enter, args=(i, count, port, device if has_group else None, act, arguments))
        for i in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def run_ranks(count: int, act: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """`act(*arguments)` on `count` ranks, until all have succeeded; options as for `start_ranks`."""
    processes = start_ranks(count, act, *arguments, **options)
    join(processes)
    assert [process.exitcode for process in processes] == [0] * count


def join(processes: list[Any], timeout: float = 120.0) -> None:
    """Wait for processes; those still there after `timeout` seconds are ended, and show that by their exit code."""
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _enter(number: int, count: int, port: int, group_on: str | None, act: Callable[..., None], arguments: tuple) -> None:
    torch.set_num_threads(1)
    if count > 1:
        place = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ.update({name: str(value) for name, value in place.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with process_group(group_on, 60.0) if group_on else nullcontext():
        act(*arguments)
