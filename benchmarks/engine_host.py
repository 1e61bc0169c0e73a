"""What a step of the engine costs the host: everything but the model, which a GPU computes meanwhile.

    python benchmarks/engine_host.py               # microseconds a step, with 1,024 sequences
    python benchmarks/engine_host.py --profile     # and where they go

A tiny model lends its configuration; instead of running it, decode steps return random tokens, prefill and moves do nothing.
Requests are those of a reasoner (16 samples a prompt, lengths log-normal with mean 283, at most 512), three times as many as
run at once. A step also waits for the GPU as long as that takes; this is what must be hidden behind it.
"""

import argparse
import cProfile
import pstats
import time

import numpy as np
import torch
from engine import Case, requests_of

from m1.engine import Engine
from m1.engine.core import ADMISSION_INTERVAL
from m1.modeling import M1Config, M1ForCausalLM


def hollow_engine(num_sequences: int, longest: int) -> Engine:
    kinds = ["linear_attention", "full_attention"]
    config = M1Config(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=kinds,
        max_position_embeddings=longest,
    )
    engine = Engine(
        M1ForCausalLM(config).eval(),
        max_num_seqs=num_sequences,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        num_pages=num_sequences * -(-longest // 64),
        num_steps_ahead=2,
    )
    engine.scheduler.admission_interval = ADMISSION_INTERVAL["cuda"]
    tokens = torch.randint(1, 1000, (num_sequences,))
    logprobs = torch.randn(num_sequences)

    def decode(slots, width, num_top):
        return tokens[: len(slots)], logprobs[: len(slots)]

    engine.runner.decode = decode
    engine.runner.prefill = engine.runner._move = engine.runner._write_rows = lambda *arguments: None
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=1024)
    parser.add_argument("--profile", action="store_true", help="where the time goes")
    arguments = parser.parse_args()
    engine = hollow_engine(arguments.sequences, 1024)
    for prompt, params in requests_of(Case.parse(f"host/{arguments.sequences}/reasoner"), 1000):
        engine.submit(prompt, params)
    seconds = []
    recorder = cProfile.Profile()
    if arguments.profile:
        recorder.enable()
    while engine.has_work:
        start = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - start)
    recorder.disable()
    times = 1e6 * np.array(seconds)
    print(
        f"{len(times)} steps, {engine.metrics.num_generated_tokens:,} tokens: mean {times.mean():.0f} µs a step, median "
        f"{np.median(times):.0f}, 95 % {np.quantile(times, 0.95):.0f}, longest {times.max():.0f}; "
        f"{1e6 * times.sum() / 1e6 / engine.metrics.num_generated_tokens:.3f} µs a token"
    )
    if arguments.profile:
        pstats.Stats(recorder).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
