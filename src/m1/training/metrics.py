"""Metrics of a run: one JSON object a line, kept in memory too, and handed to trackers (`trackers.py`).

What is measured is decided by the loop and the stages.
"""

import json
import math
from pathlib import Path
from typing import Any

from m1.storage import write_text
from m1.training.trackers import Tracker, scalars

Record = dict[str, Any]


class MetricsLog:
    """Appends records, each with a `step`, to a file (or to memory alone, without a path); `records` holds this run's.

    Numbers that JSON can't hold (NaN, infinities) are written as null.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        self.trackers: list[Tracker] = []

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
        for tracker in self.trackers:
            tracker.log(record["step"], scalars(record))

    def close(self) -> None:
        """End the trackers; the file is whole after every write."""
        for tracker in self.trackers:
            tracker.close()


def read_metrics(path: str | Path) -> list[Record]:
    """The records of a metrics.jsonl, of a run that may still write it: a last line without its end is left out.

    Raises ValueError naming the line for one that is no record.
    """
    records = []
    text = Path(path).read_text(encoding="utf-8")
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            record["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a record of metrics ({error!r})") from error
        records.append(record)
    return records


def _to_line(record: Record) -> str:
    finite = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()}
    return json.dumps(finite) + "\n"
