"""The stages on a GPU: the same losses as on the CPU, and sampling with the engine."""

import contextlib
import copy

import pytest
import torch
from torch.distributed.fsdp import FSDPModule

from m1.config import AlignConfig, DistillConfig, GRPOConfig, OnPolicyConfig, SFTConfig
from m1.training.align import align
from m1.training.distill import distill
from m1.training.grpo import grpo
from m1.training.on_policy import distill_on_policy
from m1.training.select import select
from m1.training.sft import sft
from tests.training import ranks, tiny
from tests.training.test_grpo import PROBLEMS, TOKENIZER, RewardExactly, make_config, make_model

pytestmark = pytest.mark.gpu

SIZES = {"steps": 4, "tokens_per_step": 80, "tokens_per_batch": 40, "max_length": 30, "precision": "float32"}


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("stage", ["align", "distill", "sft"])
def test_losses_are_the_cpus(stage, mixer):
    student = tiny.model(mixer)
    teacher, documents = tiny.teacher_of(student), tiny.documents(8)
    losses = []
    for device in ("cpu", "cuda"):
        mine, other = copy.deepcopy(student).to(device), copy.deepcopy(teacher).to(device)
        if stage == "align":
            result = align(mine, other, documents, AlignConfig(**SIZES), progress=False)
        elif stage == "distill":
            result = distill(mine, other, documents, DistillConfig(**SIZES, ce_weight=0.2), progress=False)
        else:
            result = sft(mine, documents, SFTConfig(**SIZES), progress=False)
        losses.append([record["loss"] for record in result.metrics])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_grpo_with_the_engine(precision):
    model = make_model().to("cuda")
    config: GRPOConfig = make_config(steps=20, samples_per_problem=32, tokens_per_batch=600, precision=precision)
    result = grpo(model, TOKENIZER, PROBLEMS, config, scorer=RewardExactly(), progress=False)
    assert result.last["reward"] > 0.8
    gaps = [record["log_prob_gap"] for record in result.metrics if "log_prob_gap" in record]  # steps whose groups differ
    assert max(gaps) < (1e-3 if precision == "float32" else 0.05)
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
@pytest.mark.parametrize("stage", ["align", "distill", "sft"])
def test_a_divided_model_trains_as_a_whole_one(stage, mixer, precision, monkeypatch):
    """One rank of NCCL and FSDP2, which is all that one GPU allows, against none."""
    losses = []
    for number in range(2):
        student = tiny.model(mixer).to("cuda")
        teacher, documents = tiny.teacher_of(student).to("cuda"), tiny.documents(8)
        sizes = SIZES | {"precision": precision, "replicate": "never"}
        with ranks.process_group("cuda", 60) if number else contextlib.nullcontext():
            if stage == "align":
                result = align(student, teacher, documents, AlignConfig(**sizes), progress=False)
            elif stage == "distill":
                result = distill(student, teacher, documents, DistillConfig(**sizes, ce_weight=0.2), progress=False)
            else:
                result = sft(student, documents, SFTConfig(**sizes), progress=False)
            assert isinstance(student, FSDPModule) == bool(number)
        losses.append([record["loss"] for record in result.metrics])
        place = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ranks.free_port()}
        for name, value in place.items():
            monkeypatch.setenv(name, str(value))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5 if precision == "float32" else 1e-3)


@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_on_policy_with_the_engine(mixer):
    student = tiny.model(mixer, attention=(2,), layers=3)
    teacher = tiny.teacher_of(student).to("cuda")
    config = OnPolicyConfig(
        steps=15,
        problems_per_step=4,
        samples_per_problem=4,
        max_new_tokens=6,
        max_length=20,
        tokens_per_batch=60,
        learning_rate=1e-2,
        mixer_learning_rate=1e-2,
        precision="float32",
    )
    result = distill_on_policy(student.to("cuda"), teacher, None, ranks.PROMPTS, config, progress=False)
    assert result.last["kl"] < 0.4 * result.metrics[0]["kl"]


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_a_cached_teacher_is_the_cpus(kl, tmp_path):
    student = tiny.model("mamba2")
    teacher, documents = tiny.teacher_of(student), tiny.documents(8)
    losses = []
    for device in ("cpu", "cuda"):
        source = ranks.cached(copy.deepcopy(teacher).to(device), tmp_path / device)
        config = DistillConfig(**SIZES, kl=kl, ce_weight=0.2)
        result = distill(copy.deepcopy(student).to(device), source, documents, config, progress=False)
        losses.append([record["loss"] for record in result.metrics])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_selection_is_the_cpus():
    student = tiny.model("mamba2", attention=(), layers=4)
    teacher, documents = tiny.teacher_of(student), tiny.documents(6)
    found = []
    for device in ("cpu", "cuda"):
        mine, other = copy.deepcopy(student).to(device), copy.deepcopy(teacher).to(device)
        found.append(select(mine, other, documents, 2, tokens_per_batch=40, precision="float32", progress=False))
    assert found[1].ranking == found[0].ranking
    for one, other in zip(*(selection.rounds for selection in found), strict=True):
        assert other.kl_of_layer == pytest.approx(one.kl_of_layer, rel=1e-3)
