"""A step of training through the Triton kernels, in their interpreter, against the same step through their references."""

import pytest
import torch

from m1.config import DistillConfig
from m1.kernels import dispatch
from m1.training import losses
from m1.training.distill import distill
from tests.training import tiny


@pytest.mark.skipif(torch.cuda.is_available(), reason="there a step runs compiled kernels: test_gpu.py")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of masked elements
@pytest.mark.parametrize("mixer", ["mamba1", "mamba2"])
def test_a_step_through_the_kernels_is_one_through_the_references(mixer, monkeypatch):
    pytest.importorskip("triton")
    sizes = {"steps": 1, "tokens_per_step": 30, "tokens_per_batch": 30, "max_length": 30, "warmup_steps": 1}
    config = DistillConfig(precision="float32", learning_rate=1e-3, ce_weight=0.1, **sizes)
    found = []
    for is_on in (False, True):
        monkeypatch.setattr(dispatch, "use_triton", lambda tensor, is_on=is_on: is_on)
        monkeypatch.setattr(losses, "_has_kernel", lambda logits, is_on=is_on: is_on)
        student = tiny.model(mixer)
        teacher = tiny.teacher_of(student)
        result = distill(student, teacher, tiny.documents(2, high=9), config, progress=False)
        found.append([record[name] for record in result.metrics for name in ("loss", "kl", "ce", "grad_norm")])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
