"""How much of some training problems stands in the test sets already: what not to train on before testing.

    python benchmarks/overlap.py runs/problems/gsm8k_train_rest.jsonl data/samples gym:gsm_symbolic --tests gsm8k,math500

For each problem: the share of its runs of five words (case, punctuation and the values of numbers aside) that it has in
common with one test problem, the nearest. 1 is a copy, maybe with other numbers; a problem above --threshold is called close.
reasoning-gym's gsm_symbolic, whose templates are GSM8K test problems with other names and numbers, has 0.35 in the mean; the
training problems of GSM8K, which have the same authors as the test's, 0.03: that much is chance. Problems of fewer than eight
words are left out.
"""

import argparse
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from m1.evaluation.tasks import load_task, parse_tasks
from m1.training.sources import read_prompts

RUN = 5  # words; runs of four are common speech, of eight rarely survive a change of names
FEWEST_WORDS = 8
_WORD = re.compile(r"[a-z]+|\d[\d,.]*")


@dataclass(frozen=True, slots=True)
class Overlap:
    """Of one source: its different problems that are long enough, their mean share in common with the nearest test
    problem, how many are above the threshold, how many have all in common, and the three with the largest shares."""

    source: str
    problems: int
    mean_share: float
    close: int
    same: int
    closest: tuple[tuple[float, str, str], ...]  # share, problem, test problem


def words(text: str) -> list[str]:
    """Lower-case words; every number is `#`."""
    return ["#" if word[0].isdigit() else word for word in _WORD.findall(text.lower())]


def runs(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[start : start + RUN]) for start in range(len(found) - RUN + 1)}


class TestProblems:
    """The test problems by the runs of words in them."""

    __test__ = False  # not a test, says pytest

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = texts
        self._holders = defaultdict[tuple[str, ...], list[int]](list)
        for number, text in enumerate(texts):
            for run in runs(text):
                self._holders[run].append(number)

    def nearest(self, text: str) -> tuple[float, str]:
        """(share of the text's runs that it has in common with one test problem, at most; that problem)"""
        own = runs(text)
        counts = Counter(number for run in own for number in self._holders.get(run, ()))
        if not counts:
            return 0.0, ""
        number, count = counts.most_common(1)[0]
        return count / len(own), self.texts[number]


def overlap(source: str, texts: Iterable[str], tests: TestProblems, threshold: float) -> Overlap:
    kept = [text for text in dict.fromkeys(texts) if len(words(text)) >= FEWEST_WORDS]
    found = [(*tests.nearest(text), text) for text in kept]
    closest = [one for one in sorted(found, reverse=True)[:3] if one[0]]
    return Overlap(
        source,
        len(kept),
        round(sum(share for share, _, _ in found) / max(1, len(kept)), 4),
        sum(share > threshold for share, _, _ in found),
        sum(share == 1 for share, _, _ in found),
        tuple((round(share, 3), text, test) for share, test, text in closest),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="as --data of the training stages: files, directories, gym:NAME")
    parser.add_argument("--tests", default="gsm8k,math500", help="benchmarks, comma-separated")
    parser.add_argument("--data-dir", default="", help="where benchmarks lie as JSON lines, instead of downloading them")
    parser.add_argument("--num-problems", type=int, default=1000, help="drawn from each reasoning-gym generator")
    parser.add_argument("--suffix", default="\nLet's think step by step", help="from here on a prompt is not the problem's")
    parser.add_argument("--threshold", type=float, default=0.4, help="a problem with a larger share is close")
    parser.add_argument("--show", action="store_true", help="print the three closest pairs of each source")
    parser.add_argument("--out", type=Path, help="JSON file, without texts")
    arguments = parser.parse_args()
    tasks = [load_task(task, data_dir=arguments.data_dir) for task in parse_tasks(arguments.tests)]
    tests = TestProblems([problem.problem for task in tasks for problem in task])
    rows = []
    print(f"beside {len(tests.texts):,} problems of {arguments.tests}")
    print(f"{'problems':>10}{'mean share':>12}{'close':>8}{'same':>8}  source")
    for source in arguments.sources:
        prompts = read_prompts([source], num_problems=arguments.num_problems, seed=0, suffix="")
        row = overlap(source, (prompt.partition(arguments.suffix)[0] for prompt in prompts), tests, arguments.threshold)
        print(f"{row.problems:10,}{row.mean_share:12.3f}{row.close:8,}{row.same:8,}  {source}")
        for share, text, test in row.closest if arguments.show else ():
            print(f"{share:22.3f}  {text!r}\n{'':24}{test!r}")
        rows.append(row)
    if arguments.out:
        settings = {key: value for key, value in vars(arguments).items() if key != "out"}
        arguments.out.write_text(
            json.dumps(
                {**settings, "rows": [{key: value for key, value in asdict(row).items() if key != "closest"} for row in rows]},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
