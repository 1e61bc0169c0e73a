"""Several ranks: the same training as on one, whatever is divided how."""

import pytest
import torch

from tests.numerics import RANKS_EQUAL_ONE, rel_rms
from tests.training import ranks


@pytest.fixture(scope="module")
def on_two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two-ranks")
    ranks.run_ranks(2, ranks.run_all_cases, out)
    return out


@pytest.mark.parametrize("name", ranks.CASES)
def test_two_ranks_train_as_one_does(name, on_two, tmp_path):
    tolerance = RANKS_EQUAL_ONE[torch.bfloat16 if "bf16" in name else torch.float32]
    ranks.run_case(name, tmp_path)
    weights, metrics = ranks.read_case(name, tmp_path)
    weights_of_two, metrics_of_two = ranks.read_case(name, on_two)
    for mine, theirs in zip(metrics, metrics_of_two, strict=True):
        for key in mine.keys() - {"seconds", "tokens_per_second"}:
            assert theirs[key] == pytest.approx(mine[key], rel=tolerance), key
    assert weights.keys() == weights_of_two.keys()
    for key, weight in weights.items():
        assert rel_rms(weights_of_two[key], weight) < tolerance, key
