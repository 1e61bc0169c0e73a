"""Directories that appear whole or not at all, run records, what tells models apart, room on disk and in memory. No torch."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

RUN_RECORD = "m1_run.json"
RUN_CONFIG = "run.json"
GIB = 2**30


@contextmanager
def new_directory(path: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary directory beside `path` that takes its name when the block succeeds, and vanishes when it fails.

    Raises FileExistsError if `path` exists and `overwrite` is false (an empty directory may be filled). With `overwrite`, the
    old directory stands until the new one is complete.
    """
    path = Path(path)
    is_taken = path.exists() and (not path.is_dir() or any(path.iterdir()))
    if is_taken and not overwrite:
        raise FileExistsError(f"{path} exists already; give another output or add --overwrite")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.partial-", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old-", dir=path.parent))
            path.rename(old / path.name)
            temporary.rename(path)
            shutil.rmtree(old)
        else:
            temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a file under a temporary name, then rename it: readers see the old text or the new, never half."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_run_record(directory: str | Path, command: str, config: dict[str, Any], **facts: Any) -> None:
    """`m1_run.json`: what made this directory: the command, its resolved config, code revision, and facts such as metrics.

    The records of earlier stages, found in the config's input model, go along under "history".
    """
    history: list[dict] = []
    for key in ("model", "base"):
        earlier = read_run_record(config[key]) if isinstance(config.get(key), (str, Path)) else None
        if earlier:
            history = [*earlier.pop("history", []), earlier]
            break
    record = {
        "command": command,
        "argv": [Path(sys.argv[0]).name, *sys.argv[1:]],  # where the program lies says nothing about what it did
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "revision": git_revision(),
        "config": config,
        **facts,
        "history": history,
    }
    write_json(Path(directory) / RUN_RECORD, record)


def begin_run(directory: str | Path, command: str, config: dict[str, Any]) -> None:
    """Make a directory with `run.json` in it, which keeps command and config; one that has it already stays as it is."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / RUN_CONFIG).is_file():
        write_json(directory / RUN_CONFIG, {"command": command, "config": config})


def require_same_run(
    directory: str | Path, command: str, config: dict[str, Any], *, free_to_change: Collection[str] = ()
) -> None:
    """Check that `directory` is not there, empty, or was begun by `begin_run` with the same command and config.

    Raises FileExistsError for a directory with something else in it, ValueError naming a key (none of `free_to_change`) in
    which the run there differs.
    """
    directory = Path(directory)
    path = directory / RUN_CONFIG
    if directory.exists() and not directory.is_dir():
        raise FileExistsError(f"{directory} is a file; give another --out")
    if not path.is_file():
        if directory.is_dir() and any(not file.name.startswith(".") for file in directory.iterdir()):
            raise FileExistsError(f"{directory} exists and holds no run of `m1 {command}`; give another --out")
        return
    begun = json.loads(path.read_text(encoding="utf-8"))
    if begun["command"] != command:
        raise ValueError(f"{directory} is a run of `m1 {begun['command']}`, not of `m1 {command}`; give another --out")
    before, now = begun["config"], json.loads(json.dumps(config))
    for key in sorted((before.keys() | now.keys()) - set(free_to_change)):
        if before.get(key) != now.get(key):
            raise ValueError(
                f"{directory} was begun with {key} = {before.get(key)!r}, not {now.get(key)!r}: "
                "give the same to go on, or another --out to start anew"
            )


def read_run_record(directory: str | Path) -> dict[str, Any] | None:
    """The run record of a directory, or None if it has none."""
    path = Path(directory) / RUN_RECORD
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def git_revision() -> str | None:
    """The revision of the code that runs, with "+changes" if files differ from it; None outside a checkout.

    M1_REVISION of the environment goes first: a job whose files were copied to another machine has no checkout there.
    """
    if given := os.environ.get("M1_REVISION"):
        return given
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None  # installed from a wheel, or git is not there: a record without a revision is still true


def require_disk(path: str | Path, num_bytes: int, purpose: str) -> None:
    """Raise OSError unless the file system of `path` has `num_bytes` free (plus 5 %)."""
    place = Path(path).resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes * 1.05:
        raise OSError(f"{purpose} needs {num_bytes / GIB:.2f} GiB on the disk of {path}, {free / GIB:.2f} GiB are free")


def available_memory() -> int | None:
    """Bytes of main memory that a new process may use: the system's estimate, or the cgroup's limit if lower."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        limits.append(int(fields["MemAvailable"].split()[0]) * 1024)
    maximum, current = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if maximum.exists() and current.exists() and maximum.read_text().strip() != "max":
        limits.append(int(maximum.read_text()) - int(current.read_text()))
    return min(limits) if limits else None


def require_memory(num_bytes: int, purpose: str) -> None:
    """Raise MemoryError unless about `num_bytes` of main memory are available (not checked where the system doesn't say)."""
    available = available_memory()
    if available is not None and available < num_bytes:
        raise MemoryError(f"{purpose} needs about {num_bytes / GIB:.1f} GiB of memory, {available / GIB:.1f} GiB are available")


def weights_fingerprint(directory: str | Path) -> str | None:
    """A hash of a model directory's config and of its weights, 16 hexadecimal digits; None where there are none (a hub name).

    Every byte is read, a thread a file: models of one training differ in a few tensors only, which may be small.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        return None
    files += Path(directory).glob("config.json")
    with ThreadPoolExecutor(max_workers=8) as threads:
        hashes = threads.map(_hash_of_file, files)
        parts = [f"{path.name} {content}" for path, content in zip(files, hashes, strict=True)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _hash_of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
