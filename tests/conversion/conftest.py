"""A tiny base on disk, as GGUF and as a Hugging Face directory, made once for the room."""

from pathlib import Path

import pytest
import torch

from m1.conversion.convert import import_base
from tests.conversion.tiny import tiny_base, write_gguf


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_base())


@pytest.fixture(scope="session")
def base_directory(gguf_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_base(gguf_file, tmp_path_factory.mktemp("base") / "tiny", dtype=torch.float32)
