"""What the reasoning tests share: a verifier with warm processes, and the benchmark files where they exist."""

import os
from pathlib import Path

import pytest

from m1.reasoning.verify import Verifier


@pytest.fixture(scope="session")
def verifier():
    with Verifier(num_workers=2) as shared:
        yield shared


@pytest.fixture(scope="session")
def shared_data() -> Path:
    path = Path(os.environ.get("M1_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no benchmark files at {path}; set M1_SHARED_DATA")
    return path
