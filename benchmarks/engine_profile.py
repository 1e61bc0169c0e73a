"""What the GPU did during some steps: time by class of kernel, and the share of time in which it did nothing."""

import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType

CLASSES = {
    "attention": r"_decode_split|_combine_kernel|flash|fmha|paged|_prefill",
    "mixer": r"mamba|conv1d|_conv_|_update_kernel|_step_kernel|scan_fwd|_chunk|_state_",
    "sampling": r"_scan_kernel|_finish_kernel",
    "norm": r"_norm_kernel",
    "rope and cache writes": r"_rope|_write_kernel|_rotary",
    "activation": r"_forward_kernel|_swiglu|_quantize",
    "products": r"_product_kernel|gemm|nvjet|cutlass|xmma|splitk|gemv|cublas|sm90|sm80|_mm_|matmul",
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
