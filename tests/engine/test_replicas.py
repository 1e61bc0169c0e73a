"""Two ranks sample as one engine does, whoever takes which prompt; errors reach every rank."""

import json
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from m1.engine import SamplingParams
from m1.engine.replicas import Replicas
from tests.engine.models import random_prompts, tiny_engine, tiny_model
from tests.training.ranks import run_ranks

PROMPTS = random_prompts((3, 7, 20, 2, 11, 5, 9, 14, 4, 6, 8, 10))
PARAMS = [SamplingParams(n=1 + i % 3, seed=i, max_tokens=4 + 3 * (i % 4)) for i in range(len(PROMPTS))]


def sample_on_a_rank(out: Path) -> None:
    """Runs in each rank's process: writes what it got, and what it did itself."""
    rank = dist.get_rank()
    engine = tiny_engine(tiny_model(), max_num_seqs=3, max_model_len=64)
    step = engine.step

    def step_slowly():  # so that no rank takes everything before the other has begun
        time.sleep(0.01)
        step()

    engine.step = step_slowly
    replicas = Replicas(engine)
    found = []
    for _ in range(2):  # the second call counts anew
        outputs = replicas.generate(PROMPTS if rank == 0 else None, PARAMS if rank == 0 else None)
        found.append([[c.token_ids for c in completions] for completions in outputs])
    num_done = engine.metrics.num_generated_tokens
    errors = []
    with pytest.raises(ValueError) as refused:
        replicas.generate([[1], []], SamplingParams())
    errors.append(str(refused.value))
    if rank == 1:
        engine.runner.decode = None  # every step fails there
    with pytest.raises(RuntimeError) as failed:
        replicas.generate(PROMPTS, PARAMS)
    errors.append(str(failed.value))
    (out / f"{rank}.json").write_text(json.dumps({"found": found, "tokens": num_done, "errors": errors}))


def test_two_ranks_sample_as_one(tmp_path):
    run_ranks(2, sample_on_a_rank, tmp_path)
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    outputs = tiny_engine(tiny_model()).generate(PROMPTS, PARAMS)
    expected = [[c.token_ids for c in completions] for completions in outputs]
    total = sum(len(ids) for completions in expected for ids in completions)
    for rank in ranks:
        assert rank["found"] == [expected] * 2
        assert rank["errors"][0].startswith("prompts[1]: the prompt is empty")
        assert rank["errors"][1].startswith("sampling failed on rank 1: TypeError")
        assert 0 < rank["tokens"] < 2 * total
    assert sum(rank["tokens"] for rank in ranks) == 2 * total


def test_replicas_need_a_process_group():
    with pytest.raises(ValueError, match="torchrun"):
        Replicas(tiny_engine(tiny_model()))
