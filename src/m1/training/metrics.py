"""Metrics of a run: one JSON object a line, kept in memory too. What is measured is decided by the loop and the stages."""

import json
import math
from pathlib import Path
from typing import Any

from m1.storage import write_text

Record = dict[str, Any]


class MetricsLog:
    """Appends records, each with a `step`, to a file (or to memory alone, without a path); `records` holds this run's.

    Numbers that JSON can't hold (NaN, infinities) are written as null.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[Record] = []

    def resume(self, step: int) -> None:
        """Keep the records of steps up to `step`, which a checkpoint holds; what came after it will be written again.

        A last line that was cut off by a crash is dropped too.
        """
        if self.path is None or not self.path.exists():
            return
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break  # the crash cut this line off: nothing after it was written
            if record["step"] <= step:
                self.records.append(record)
        write_text(self.path, "".join(map(_to_line, self.records)))

    def write(self, record: Record) -> None:
        self.records.append(record)
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_to_line(record))


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _to_line(record: Record) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite) + "\n"
