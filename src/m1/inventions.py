"""Problems that the model invents for `m1 sample`: which there are, and what of a completion becomes one. No models here."""

from typing import Any

from m1.engine.sequence import Completion
from m1.reasoning.problems import Problem
from m1.sample_directory import SampleDirectory

BLOCK_INVENTIONS = 64  # a kill loses at most so many


class Inventions:
    """This process's share of a directory's inventions; a context manager that holds the lock of their file.

    missing: the ids of those that are not there yet. problems: those that are there, without those of which nothing came.
    """

    def __init__(self, directory: SampleDirectory, rank: int, num_ranks: int) -> None:
        ids = [directory.invented_id(number) for number in range(rank, directory.config.invent, num_ranks)]
        known = directory.inventions()
        self.missing = [id_ for id_ in ids if id_ not in known]
        self.problems = [Problem(id_, text, "") for id_ in ids if (text := known.get(id_)) is not None]
        self._texts = set(known.values())
        self._unwritten: list[dict[str, Any]] = []
        self._writer = directory.writer("problems", rank) if ids else None

    def __enter__(self) -> "Inventions":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._writer is not None:
            self._writer.__exit__(*exception)

    def add(self, id_: str, completion: Completion) -> Problem | None:
        """The problem in a completion; None if it has no end, no text, or one that there is already."""
        text = completion.text.strip()
        is_new = bool(text) and text not in self._texts and completion.finish_reason == "stop"
        self._texts.add(text)
        self._unwritten.append({"id": id_, "problem": text if is_new else None})
        if len(self._unwritten) == BLOCK_INVENTIONS:
            self.write()
        return Problem(id_, text, "") if is_new else None

    def write(self) -> None:
        """On disk, before any sample of them is."""
        if self._writer is not None:
            self._writer.append(self._unwritten)
            self._unwritten = []
