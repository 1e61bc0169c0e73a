"""Two GPUs over NCCL: the same training as on one, and a run that loses a rank and goes on with another number of them."""

import json
import signal

import pytest
import torch

from m1.training.select import Selection
from tests.numerics import RANKS_EQUAL_ONE, ROUNDING, rel_rms
from tests.training import ranks
from tests.training.test_checkpoint import KilledAtStep7, checkpoints_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

CASES = [
    "align, mamba2, bf16, teacher divided",
    "distill, mamba2, embeddings and attention frozen",
    "sft, untied, biases, averaged",
    "sft, recomputed, kept gathered, bf16",
    "grpo",
    "distill, bf16, replicated",
    "grpo, replicated",
    "on-policy, mamba2",
]


@pytest.fixture(scope="module")
def on_two(request, tmp_path_factory):
    """Those of the cases that this session has asked for, in one pair of processes."""
    out = tmp_path_factory.mktemp("two-gpus")
    asked = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    ranks.run_ranks(2, ranks.run_cases, [name for name in CASES if name in asked], out, "cuda", device="cuda")
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_gpus_train_as_one_does(name, on_two, tmp_path):
    tolerance = RANKS_EQUAL_ONE[torch.bfloat16 if "bf16" in name else torch.float32]
    ranks.run_case(name, tmp_path, "cuda")
    weights, metrics = ranks.read_case(name, tmp_path)
    weights_of_two, metrics_of_two = ranks.read_case(name, on_two)
    losses, losses_of_two = ([record["loss"] for record in of if "loss" in record] for of in (metrics, metrics_of_two))
    assert losses_of_two == pytest.approx(losses, rel=tolerance, abs=ROUNDING)
    errors = {key: rel_rms(weights_of_two[key], weight) for key, weight in weights.items()}
    assert max(errors.values()) < tolerance, errors


def test_two_gpus_select_as_one_does(tmp_path):
    ranks.run_ranks(2, ranks.run_select, tmp_path, "cuda", device="cuda")
    first, second = (Selection.from_json(json.loads((tmp_path / f"selection-{number}.json").read_text())) for number in (0, 1))
    assert first == second
    expected = ranks.run_select(tmp_path, "cuda")
    assert first.ranking == expected.ranking
    for one, other in zip(first.rounds, expected.rounds, strict=True):
        assert one.kl_of_layer == pytest.approx(other.kl_of_layer, rel=RANKS_EQUAL_ONE[torch.float32])


@pytest.mark.parametrize(("before", "after", "replicate"), [(1, 2, "auto"), (2, 1, "never"), (2, 2, "auto"), (2, 2, "never")])
def test_a_run_goes_on_with_any_number_of_gpus(tmp_path, before, after, replicate):
    out = tmp_path / "out"
    fields = {"device": "cuda", "checkpoint_every": 3, "replicate": replicate, "async_save": False}
    processes = ranks.start_ranks(before, ranks.run_sft, out, fields, KilledAtStep7, device="cuda")
    ranks.join(processes)
    assert processes[-1].exitcode == -signal.SIGKILL
    assert all(process.exitcode != 0 for process in processes)
    assert checkpoints_of(out) == ["step-00000006", "step-00000003"]
    ranks.run_ranks(after, ranks.run_sft, out, fields, device="cuda")
    whole = tmp_path / "whole"
    ranks.run_ranks(1, ranks.run_sft, whole, fields, device="cuda")
    expected = ranks.weights_of(whole)
    errors = {name: rel_rms(weight, expected[name]) for name, weight in ranks.weights_of(out).items()}
    assert max(errors.values()) < RANKS_EQUAL_ONE[torch.float32], errors
