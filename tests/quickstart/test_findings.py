"""What the quickstart writes about itself."""

import pytest

from m1.quickstart.findings import without_directory


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("/somewhere/on/a/disk/model.gguf", "model.gguf"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("--device", "--device"),
        ("runs/quickstart", "runs/quickstart"),
    ],
)
def test_directories_of_a_machine_are_not_recorded(word: str, expected: str) -> None:
    assert without_directory(word) == expected
