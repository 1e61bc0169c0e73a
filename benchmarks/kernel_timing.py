"""What one process of benchmarks/kernels.py does with one case: which there are, and how ours and the references are timed.

Times are medians of replayed CUDA graphs over input sets larger than the L2 cache; a backward's time is that of forward and
backward less the forward's. References run without a graph, torch.compile of them over one input set alone, which is to its
advantage where that fits the cache.
"""

import argparse
import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from kernel_case import Calls, Case, bytes_a_second

REFERENCE_SECONDS = 0.1  # roughly what timing one reference may take after its first call
OURS, REFERENCE, COMPILED = "ours", "reference", "compiled"  # what is timed of a case; the last: torch.compile of the reference
WITHOUT_GRAPH = (
    "without a graph"  # the note on a time after a capture that failed: the process may be unable to capture another
)


def all_cases() -> list[Case]:
    import kernel_cases_decode
    import kernel_cases_scan
    import kernel_cases_ssd

    return [*kernel_cases_scan.cases(), *kernel_cases_ssd.cases(), *kernel_cases_decode.cases()]


def is_named(case: Case, patterns: list[str]) -> bool:
    """Whether the case's name contains one of the patterns, or there are none."""
    return not patterns or any(pattern in case.name for pattern in patterns)


def chosen_cases(patterns: list[str]) -> list[Case]:
    """The cases that the patterns name, in the patterns' order: what is wanted most is timed first."""
    chosen = [case for case in all_cases() if is_named(case, patterns)]
    return sorted(chosen, key=lambda case: next((i for i, pattern in enumerate(patterns) if pattern in case.name), 0))


def is_compiled_too(case: Case, options: argparse.Namespace) -> bool:
    """Whether torch.compile of the case's reference is timed."""
    asked = options.compile is not None and not options.skip_reference and not options.sweep
    return asked and case.build_reference is not None and is_named(case, options.compile)


def jobs_of(options: argparse.Namespace) -> list[tuple[str, Case]]:
    """What to time, in order: our kernels of all cases, then torch.compile of their references, then the references."""
    cases = chosen_cases(options.only)
    jobs = [(OURS, case) for case in cases]
    if not options.skip_reference and not options.sweep:
        jobs += [(COMPILED, case) for case in cases if is_compiled_too(case, options)]
        jobs += [(REFERENCE, case) for case in cases if case.build_reference is not None]
    return jobs


def time_calls(calls: Calls, repeats: int = 20) -> float:
    """Median seconds a call, replaying one CUDA graph of all of them in turn."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in itertools.pairwise(events))
    return times[len(times) // 2] / 1000 / len(calls)


def seconds_of(call: Callable[[], Any]) -> float:
    """Seconds between the two ends of one call on the GPU."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000


def time_eagerly(calls: Calls) -> float:
    """Median seconds a call without a graph, of as many repetitions as REFERENCE_SECONDS allow."""
    calls[0]()
    times: list[float] = []
    for call in itertools.cycle(calls):
        times.append(seconds_of(call))
        if len(times) >= 20 or (len(times) >= 2 and sum(times) > REFERENCE_SECONDS):
            return sorted(times)[len(times) // 2]
    raise AssertionError("a case has at least one call")


def copy_rate() -> float:
    """Bytes read plus written a second by a 2 GiB device-to-device copy."""
    source = torch.randint(0, 255, (2**31,), dtype=torch.uint8, device="cuda")
    return 2 * source.numel() / time_eagerly([functools.partial(torch.empty_like(source).copy_, source)])


def hardware() -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "copy_bytes_a_second": copy_rate(),
        "floor_bytes_a_second": bytes_a_second(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def time_ours(build: Callable[[], Calls]) -> tuple[float, str]:
    """Seconds a call, and a note if the calls could not be captured in a graph."""
    calls = build()
    try:
        return time_calls(calls), ""
    except RuntimeError as error:
        if not any(word in str(error) for word in ("captur", "stream")):
            raise
        torch.cuda.synchronize()
        return time_eagerly(calls), WITHOUT_GRAPH


def time_case(case: Case, config: Any = None) -> tuple[float, str]:
    """Seconds of a case as chosen, or in another configuration, less what it says to subtract."""
    build = case.build if config is None else (lambda: case.build_with(config))  # type: ignore[attr-defined]
    seconds, note = time_ours(build)
    forward = case.build_forward
    if forward is not None:
        seconds -= time_ours(lambda: forward(config))[0]
    return seconds, note


def compiled_calls(case: Case) -> Calls:
    """torch.compile of the case's reference and, where that is to be subtracted, of its forward; called once each."""
    builds = [build for build in (case.build_reference, case.build_reference_forward) if build is not None]
    calls = [torch.compile(build()[0], dynamic=False) for build in builds]
    for call in calls:
        call()
    return calls


def time_compiled(calls: Calls) -> float:
    """Seconds of what `compiled_calls` made."""
    seconds, *forward = [time_eagerly([call]) for call in calls]
    return seconds - sum(forward)


def time_reference(case: Case) -> float:
    """Seconds of the torch reference."""
    assert case.build_reference is not None
    forward = case.build_reference_forward
    return time_eagerly(case.build_reference()) - (time_eagerly(forward()) if forward else 0.0)


def run_job(kind: str, case: Case) -> dict[str, Any]:
    """What a job adds to the row of its case."""
    if kind == REFERENCE:
        return {"reference_seconds": time_reference(case)}
    if kind == COMPILED:
        return {"compiled_seconds": time_compiled(compiled_calls(case))}
    seconds, note = time_case(case)
    return {
        "seconds": seconds,
        "bytes": case.bytes_moved,
        "floor_seconds": case.floor_seconds,
        "times_floor": seconds / case.floor_seconds,
        "bytes_a_second": case.bytes_moved / seconds,
        "note": note,
    }


def variants(case: Case) -> list[tuple[str, Any]]:
    """The configurations that a sweep begins with: each field's values, the others as chosen."""
    fields = getattr(case, "fields", {})
    start = case.default() if fields else None  # type: ignore[attr-defined]
    return [(f"{name}={value}", start._replace(**{name: value})) for name, values in fields.items() for value in values]


def sweep_case(case: Case) -> dict[str, Any]:
    """Improve one field after another, keeping the best value; or time every entry of a case that lists whole sweeps."""
    tried: list[dict[str, Any]] = []

    def attempt(label: str, measure: Callable[[], float]) -> float:
        try:
            seconds = measure()
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            tried.append({"config": label, "error": str(error)[:300]})
            return float("inf")
        tried.append({"config": label, "seconds": seconds})
        return seconds

    best_seconds = attempt("as chosen", lambda: time_case(case)[0])
    for label, build in case.sweep.items():
        attempt(label, lambda build=build: time_ours(build)[0])  # type: ignore[misc]
    fields = getattr(case, "fields", {})
    if fields:
        best = case.default()  # type: ignore[attr-defined]
        for name, values in fields.items():
            for value in values:
                config = best._replace(**{name: value})
                if config == best:
                    continue
                seconds = attempt(str(config), lambda config=config: time_case(case, config)[0])  # type: ignore[misc]
                if seconds < best_seconds:
                    best_seconds, best = seconds, config
    tried.sort(key=lambda entry: entry.get("seconds", float("inf")))
    return {"name": case.name, "floor_seconds": case.floor_seconds, "bytes": case.bytes_moved, "sweep": tried}
