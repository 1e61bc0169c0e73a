"""`m1 report`: one HTML page of what a directory holds. Recognises the kind of directory; the pages are laid out elsewhere."""

from pathlib import Path

from m1.config import ReportConfig, require
from m1.run_page import METRICS, write_run_page


def run(config: ReportConfig) -> None:
    """The command. Raises FileNotFoundError for a missing directory, ValueError for one that there is nothing to say about."""
    require(config, "directory")
    directory = Path(config.directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such directory; give the one that --out named")
    page = Path(config.out) if config.out else directory / "report.html"
    if not (directory / METRICS).is_file():
        raise ValueError(f"{directory}: expected a training run's directory, with {METRICS} in it")
    write_run_page(directory, page)
    print(f"The report is {page}; it opens in any browser")
