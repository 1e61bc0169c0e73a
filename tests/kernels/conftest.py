"""Where the kernels under test run; tests/conftest.py has set Triton's interpreter where no GPU is."""

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> str:
    """The GPU, or the CPU (Triton kernels then run in the interpreter)."""
    return "cuda" if torch.cuda.is_available() else "cpu"
