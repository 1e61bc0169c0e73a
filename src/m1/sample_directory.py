"""The directory that `m1 sample` writes, and what is in it already. No models here.

run.json                  command, config and a fingerprint of the weights, written first: running again must fit it
problems-RANK.jsonl.gz    what the model invented; a null problem is one of which nothing came
samples-RANK.jsonl.gz     a row a sample: id, sample, problem, answer, prompt, completion, extracted, is_correct, …
m1_run.json               at the end: what was made, and how; the directory is then data
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m1.config import SampleConfig
from m1.json_lines import BlockWriter, read_blocks
from m1.storage import RUN_RECORD, begin_run, require_disk, require_same_run, weights_fingerprint, write_run_record

# Bytes on disk a token, compressed, for the check of the disk: text, token ids, log-probs.
TEXT_BYTES, ID_BYTES, LOG_PROB_BYTES = 2, 3, 8
# What may change when a directory is gone on with: how much is wanted, and what does not change a sample.
_FREE_TO_CHANGE = ("out", "device", "samples", "num_problems", "invent")


class SampleDirectory:
    """Looking at it changes nothing; `create` makes it, or goes on with it.

    Raises FileExistsError for a directory with something else in it, ValueError naming what differs from the run there.
    """

    def __init__(self, config: SampleConfig) -> None:
        self.path, self.config = Path(config.out), config
        # A model trained further under the same name is another one, whose samples do not belong here.
        self._run = dataclasses.asdict(config) | {"weights": weights_fingerprint(config.model)}
        require_same_run(self.path, "sample", self._run, free_to_change=_FREE_TO_CHANGE)

    def create(self) -> None:
        """Make the directory, or mark the one that is there as unfinished."""
        begin_run(self.path, "sample", self._run)
        (self.path / RUN_RECORD).unlink(missing_ok=True)

    def writer(self, kind: str, rank: int) -> BlockWriter:
        """Appends to this process's file of "samples" or "problems"."""
        return BlockWriter(self.path / f"{kind}-{rank:05d}.jsonl.gz")

    def _rows(self, kind: str) -> Iterator[dict[str, Any]]:
        for path in sorted(self.path.glob(f"{kind}-*.jsonl.gz")):
            yield from read_blocks(path)[0]

    def counts(self) -> Counter[str]:
        """How many samples of each problem id there are."""
        return Counter(row["id"] for row in self._rows("samples"))

    def inventions(self) -> dict[str, str | None]:
        """The problems that the model invented, by id; None where nothing came of it."""
        return {row["id"]: row["problem"] for row in self._rows("problems")}

    def invented_id(self, number: int) -> str:
        return f"invented/{self.config.seed}/{number}"

    def num_missing(self, problem_ids: list[str]) -> int:
        """Samples still to be drawn of these problems and of those to be invented."""
        counts, inventions = self.counts(), self.inventions()
        ids = [self.invented_id(number) for number in range(self.config.invent)]
        ids = problem_ids + [id_ for id_ in ids if inventions.get(id_, "") is not None]
        return sum(max(0, self.config.samples - counts[id_]) for id_ in ids)

    @property
    def is_finished(self) -> bool:
        return (self.path / RUN_RECORD).is_file()

    def require_disk(self, num_samples: int) -> None:
        """OSError unless so many samples of full length would find room."""
        a_token = TEXT_BYTES + (ID_BYTES if self.config.token_ids else 0) + (LOG_PROB_BYTES if self.config.log_probs else 0)
        purpose = f"m1 sample: {num_samples:,} samples of {self.config.max_new_tokens:,} tokens"
        require_disk(self.path, num_samples * self.config.max_new_tokens * a_token, purpose)

    def finish(self, **facts: Any) -> None:
        """Mark the directory as whole."""
        rows = [(row["is_correct"], row["num_tokens"], row["finish_reason"]) for row in self._rows("samples")]
        checked = [is_correct for is_correct, _, _ in rows if is_correct is not None]
        facts |= {
            "samples": len(rows),
            "tokens": sum(num_tokens for _, num_tokens, _ in rows),
            "checked": len(checked),
            "correct": sum(checked),
            "cut_off": sum(reason == "length" for _, _, reason in rows),
        }
        write_run_record(self.path, "sample", dataclasses.asdict(self.config), **facts)
