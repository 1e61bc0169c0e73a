"""Several ranks: the same training as on one, whatever is divided how."""

import contextlib
import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from m1 import distributed
from m1.config import DistillConfig, TrainConfig
from m1.modeling.loading import load_model, load_tokenizer
from m1.training import distill as distill_module
from m1.training import sharding
from m1.training.select import Selection
from tests.numerics import GOLDEN_LOSS, RANKS_EQUAL_ONE, ROUNDING, rel_rms
from tests.training import ranks, tiny

GOLDEN = Path(__file__).parent / "golden_losses.json"


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two-ranks")
    ranks.run_ranks(2, ranks.run_cases, list(ranks.CASES), out)
    return out


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_train_as_one_does(name, on_two, tmp_path):
    tolerance = RANKS_EQUAL_ONE[torch.bfloat16 if "bf16" in name else torch.float32]
    ranks.run_case(name, tmp_path)
    weights, metrics = ranks.read_case(name, tmp_path)
    golden = json.loads(GOLDEN.read_text())[name]  # what these steps have always given: a refactoring must not move them
    assert [record["loss"] for record in metrics if "loss" in record] == pytest.approx(golden, rel=GOLDEN_LOSS)
    weights_of_two, metrics_of_two = ranks.read_case(name, on_two)
    for mine, theirs in zip(metrics, metrics_of_two, strict=True):
        for key in mine:
            if key.startswith("seconds") or key.endswith("tokens_per_second"):
                continue
            assert theirs[key] == pytest.approx(mine[key], rel=tolerance, abs=ROUNDING), key
    assert weights.keys() == weights_of_two.keys()
    for key, weight in weights.items():
        assert rel_rms(weights_of_two[key], weight) < tolerance, key


def test_two_ranks_select_as_one_does(tmp_path):
    ranks.run_ranks(2, ranks.run_select, tmp_path)
    first, second = (json.loads((tmp_path / f"selection-{number}.json").read_text()) for number in (0, 1))
    assert first == second
    expected = ranks.run_select(tmp_path)
    assert Selection.from_json(first).ranking == expected.ranking
    for one, other in zip(Selection.from_json(first).rounds, expected.rounds, strict=True):
        assert one.kl_of_layer == pytest.approx(other.kl_of_layer, rel=RANKS_EQUAL_ONE[torch.float32])


PADDED = ["distill, mamba2, embeddings and attention frozen", "align"]


@pytest.fixture(scope="module")
def padded_on_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two-ranks-padded")
    ranks.run_ranks(2, ranks.run_padded_cases, PADDED, out)
    return out


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_of_a_divided_projection_change_nothing(name, on_two, padded_on_two):
    """A GPU pads the rows of `in_proj`: its weight must be gathered when that happens."""
    expected, _ = ranks.read_case(name, on_two)
    weights, _ = ranks.read_case(name, padded_on_two)
    errors = {key: rel_rms(weights[key], weight) for key, weight in expected.items()}
    assert max(errors.values()) < RANKS_EQUAL_ONE[torch.float32], errors


def run_command(root, out):
    """`m1 distill` as `torchrun` starts it: each rank sets up the process group itself."""
    config = DistillConfig(
        model=str(root / "hybrid"),
        teacher=str(root / "teacher"),
        data=[str(root / "sums.jsonl")],
        out=str(out),
        steps=4,
        tokens_per_step=200,
        tokens_per_batch=100,
        max_length=100,
        export_every=3,
        device="cpu",
        precision="float32",
        dtype="float32",
        shard_teacher=True,
        cache_dir=str(root / "cache"),
    )
    with open(f"{out}.printed-{os.environ.get('RANK', 'alone')}", "w") as file, contextlib.redirect_stdout(file):
        distill_module.run(config)


def test_the_command_on_two_ranks(tmp_path):
    for name, attention in (("hybrid", (1,)), ("teacher", (0, 1))):
        tiny.model("mamba2", attention=attention, vocab_size=259).save_pretrained(tmp_path / name)
        tiny.byte_tokenizer().save_pretrained(tmp_path / name)
    rows = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in range(5) for b in range(5)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    one, two = tmp_path / "one", tmp_path / "two"
    ranks.run_ranks(2, run_command, tmp_path, two, has_group=False)
    run_command(tmp_path, one)
    assert len(list((tmp_path / "cache" / "documents").iterdir())) == 1
    printed = (tmp_path / "two.printed-0").read_text()
    assert "on 2 ranks of cpu, whole on each, in float32" in printed
    assert f"The model is in {two}" in printed
    assert (tmp_path / "two.printed-1").read_text() == ""
    assert len((two / "metrics.jsonl").read_text().splitlines()) == 4
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())
    for place in ("", "exports/step-00000003"):
        mine, theirs = (load_model(out / place) for out in (one, two))
        assert (one / place / "config.json").read_text() == (two / place / "config.json").read_text()
        for name, weight in mine.named_parameters():
            assert rel_rms(theirs.get_parameter(name), weight) < RANKS_EQUAL_ONE[torch.float32], name
    assert not torch.equal(load_model(two / "exports/step-00000003").lm_head.weight, load_model(two).lm_head.weight)
    assert load_tokenizer(two / "exports/step-00000003").eos_token_id == 0
    assert not any(path.name.startswith("lm_head") for path in two.iterdir())
    assert "lm_head.weight" not in load_file(two / "model.safetensors")  # tied


def test_each_item_is_one_ranks(monkeypatch):
    """And all ranks have as many, the rest being fillers."""
    for count, size in itertools.product(range(1, 6), range(12)):
        monkeypatch.setattr(distributed, "num_ranks", lambda count=count: count)
        shares = []
        for number in range(count):
            monkeypatch.setattr(distributed, "rank", lambda number=number: number)
            shares.append(distributed.share(list(range(size))))
        assert {len(share) for share in shares} == {-(-size // count)}
        assert sorted(item for share in shares for item, counts in share if counts) == list(range(size))


def test_a_rank_has_the_gpu_of_its_number_on_the_host(monkeypatch):
    monkeypatch.setattr(distributed, "choose_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert distributed.local_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert distributed.local_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="local rank 2 has no GPU of its own, torch sees 2; start one process a GPU"):
        distributed.local_device("auto")


@pytest.mark.parametrize(
    ("replicate", "count", "num_parameters", "expected"),
    [
        ("auto", 2, 500_000_000, False),  # 8 of 80 GB
        ("auto", 2, 3_000_000_000, True),  # 48 of 80 GB
        ("auto", 1, 3_000_000_000, False),
        ("always", 2, 3_000_000_000, False),
        ("never", 2, 500_000_000, True),
    ],
)
def test_what_leaves_room_is_replicated(monkeypatch, replicate, count, num_parameters, expected):
    monkeypatch.setattr(sharding, "is_distributed", lambda: True)
    monkeypatch.setattr(sharding, "num_ranks", lambda: count)
    monkeypatch.setattr(sharding, "is_any", lambda flag: flag)
    monkeypatch.setattr(sharding, "_memory_of_rank", lambda device: 80e9)
    assert sharding.divides(TrainConfig(replicate=replicate), num_parameters, torch.device("cpu")) is expected


def test_replicate_is_a_word():
    with pytest.raises(ValueError, match="replicate: expected 'auto', 'always' or 'never', got True"):
        sharding.divides(TrainConfig(replicate=True), 1, torch.device("cpu"))
