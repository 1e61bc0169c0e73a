"""What the GPU did during some steps, by class of kernel, and the share of time in which it did nothing; which steps were slow.

Kernels that begin before the one ahead has ended (m1.kernels.launch.chaining) count from there, their waiting included: classes
may add up to more than the time.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType

from m1.engine import Engine

NUM_SLOWEST = 8  # steps that are told
FULL = 0.875  # of the places: the house counts as nearly full
CLASSES = {
    "attention": r"_decode_split|_combine_kernel|flash|fmha|paged|_prefill",
    "mixer": r"mamba|conv1d|_conv_|_update_kernel|step_kernel|scan_fwd|_chunk|_state_",
    "sampling": r"_scan_kernel|_finish_kernel",
    "norm": r"_norm_kernel",
    "rope and cache writes": r"_rope|_write_kernel|_rotary",
    "activation": r"_forward_kernel|_swiglu|_quantize",
    "products": r"product_kernel|bulk_kernel|gemm|nvjet|cutlass|xmma|splitk|gemv|cublas|sm90|sm80|_mm_|matmul",
    "copies": r"memcpy|memset",
}


@dataclass(frozen=True)
class Profile:
    """milliseconds: of the steps altogether; by_class: of kernels, a step; idle: share of the time without a kernel."""

    num_steps: int
    milliseconds: float
    idle: float
    by_class: dict[str, float]
    by_kernel: dict[str, tuple[float, float]]  # milliseconds and launches a step, of the longest ones

    def show(self) -> None:
        print(f"  {self.milliseconds / self.num_steps:.3f} ms a step, idle {self.idle:.1%};", end=" ")
        print("  ".join(f"{name} {value:.3f}" for name, value in sorted(self.by_class.items(), key=lambda kv: -kv[1])))
        for name, (value, count) in self.by_kernel.items():
            print(f"    {value:7.3f} ms {count:6.1f}x  {name[:100]}")


def class_of(kernel: str) -> str:
    for name, pattern in CLASSES.items():
        if re.search(pattern, kernel.lower()):
            return name
    return "other"


def profile(step: Callable[[], object], num_steps: int, num_kernels: int = 14) -> Profile:
    """Run `step` num_steps times under the profiler. The first and the last kernel delimit the time."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(num_steps):
            step()
        torch.cuda.synchronize()
    spans = []
    by_class: defaultdict[str, float] = defaultdict(float)
    by_kernel: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for event in recorded.events():
        if event.device_type != DeviceType.CUDA:
            continue
        start, end = event.time_range.start, event.time_range.end  # microseconds
        spans.append((start, end))
        by_class[class_of(event.name)] += (end - start) / 1000 / num_steps
        entry = by_kernel[event.name]
        entry[0] += (end - start) / 1000 / num_steps
        entry[1] += 1 / num_steps
    spans.sort()
    busy, reached = 0.0, spans[0][0]
    for start, end in spans:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    total = reached - spans[0][0]
    longest = sorted(by_kernel.items(), key=lambda kv: -kv[1][0])[:num_kernels]
    return Profile(
        num_steps=num_steps,
        milliseconds=total / 1000,
        idle=1 - busy / total,
        by_class=dict(by_class),
        by_kernel={name: (value, count) for name, (value, count) in longest},
    )


class StepWatch:
    """Steps of an engine, with what the host did in each, and when the GPU had done it: where a run is slower than its decode
    steps, this says in which."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seconds: list[float] = []
        self.notes: list[str] = []
        self.kinds: list[str] = []
        self.ends = [_event_now()]

    def step(self) -> None:
        engine, graphs = self.engine, self.engine.runner._graphs
        num_captured = graphs.num_captured if graphs else 0
        start = time.perf_counter()
        engine.step()
        self.seconds.append(time.perf_counter() - start)
        self.ends.append(_event_now())
        graphs = engine.runner._graphs
        batch = engine._core.in_flight[-1][0] if engine._core.in_flight else None
        note = f"capture {graphs.num_captured - num_captured} " if graphs and graphs.num_captured > num_captured else ""
        kind = "capture" if note else "none"
        if batch is not None:
            prefill = sum(chunk.end - chunk.start for chunk in batch.prefill)
            note += f"decode {len(batch.slots)} prefill {prefill} moves {len(batch.moves)} starting {len(batch.starting)}"
            if kind == "none":
                is_full = len(batch.slots) >= FULL * engine.capacity.max_num_seqs
                kind = "prefill" if prefill else "decode, nearly full" if is_full else "decode, fewer"
        self.kinds.append(kind)
        self.notes.append(note)

    def summary(self) -> dict[str, Any]:
        """Seconds inside steps, their median, the slowest ones: (seconds, index, what was launched), and by kind of step how
        many there were and how long the GPU took to the end of each from the end of the one before, idle time included."""
        order = sorted(range(len(self.seconds)), key=lambda index: -self.seconds[index])
        torch.cuda.synchronize()
        by_kind: defaultdict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        for kind, before, after in zip(self.kinds, self.ends, self.ends[1:], strict=False):
            by_kind[kind][0] += 1
            by_kind[kind][1] += before.elapsed_time(after) / 1000
        return {
            "step_seconds": sum(self.seconds),
            "median_step_seconds": float(np.median(self.seconds)),
            "gpu_seconds_by_kind": dict(by_kind),
            "slowest_steps": [(self.seconds[index], index, self.notes[index]) for index in order[:NUM_SLOWEST]],
        }

    def show(self) -> None:
        found = self.summary()
        print(f"  in steps {found['step_seconds']:.2f} s, median {1000 * found['median_step_seconds']:.2f} ms; GPU:", end=" ")
        print("; ".join(f"{kind}: {n} in {seconds:.3f} s" for kind, (n, seconds) in found["gpu_seconds_by_kind"].items()))
        for seconds, index, note in found["slowest_steps"]:
            print(f"    {1000 * seconds:8.1f} ms  step {index:5}  {note}", flush=True)


def _event_now() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event
