"""Judging recorded completions again: nothing is sampled, so anyone can check what a record says, or what another judge says.

Which files an evaluation has, and what is printed of them, is `m1.evaluate`'s business.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from m1.evaluation.records import open_records, read_records
from m1.evaluation.runner import label_answers, summarize_run
from m1.evaluation.summary import is_correct
from m1.reasoning.problems import Problem
from m1.reasoning.rewards import Scorer


def regrade(source: Path, out: Path, scorer: Scorer) -> dict[str, Any]:
    """Judge the completions in the records `source` again, into records `out`; the summary of these.

    The summary has `changed_verdicts` besides: how many samples are now right that were wrong, or the other way round. If
    `out` is there and of the same run, it is gone on with. Raises ValueError as `read_records` and `open_records` do, and for
    records whose rewards need more than a reference answer.
    """
    run, records = read_records(source)
    changed = 0
    with open_records(out, run) as file:
        for record in records:
            if record.get("reward", "math") != "math":
                raise ValueError(f"{source}: {record['id']} was judged by {record['reward']}, which a record can't repeat")
            if record["id"] in file.records:
                judged = file.records[record["id"]]
            else:
                problem = Problem(record["id"], record["problem"], record["answer"])
                texts = [sample["text"] for sample in record["samples"]]
                scores = scorer.score_many([problem] * len(texts), texts)
                samples = [sample | asdict(score) for sample, score in zip(record["samples"], scores)]
                judged = record | {"labels": label_answers(samples, scorer), "samples": samples}
                file.append(judged)
            changed += sum(is_correct(old) != is_correct(new) for old, new in zip(record["samples"], judged["samples"]))
        summary = summarize_run(run, [file.records[record["id"]] for record in records])
    return summary | {"changed_verdicts": changed}
