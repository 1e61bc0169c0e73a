"""`m1 report`: one HTML page of what a directory holds. Recognises the kind of directory; the pages are laid out elsewhere."""

from pathlib import Path

from m1.config import ReportConfig, require
from m1.evaluation.page import is_evaluation, write_evaluation_page
from m1.run_page import METRICS, write_run_page


def run(config: ReportConfig) -> None:
    """The command. Raises FileNotFoundError for a missing directory, ValueError for one that there is nothing to say about."""
    require(config, "directories")
    directories = [Path(directory) for directory in config.directories]
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f"{directory}: no such directory; give the one that --out named")
    page = Path(config.out) if config.out else directories[0] / "report.html"
    if all(map(is_evaluation, directories)):
        write_evaluation_page(directories, page)
    elif len(directories) == 1 and (directories[0] / METRICS).is_file():
        write_run_page(directories[0], page)
    else:
        strange = next(directory for directory in directories if not is_evaluation(directory))
        expected = "an evaluation's or a training run's directory: what --out of m1 eval, or of a training command, named"
        if len(directories) > 1:
            expected = "an evaluation's directory: only these can be compared on one page"
        inside = [path.name for path in sorted(strange.iterdir()) if is_evaluation(path) or (path / METRICS).is_file()]
        hint = f"; there are such in it: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{strange}: expected {expected}{hint}")
    print(f"The report is {page}; it opens in any browser")
