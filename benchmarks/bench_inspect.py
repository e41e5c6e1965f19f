"""Seconds that `pldr inspect` takes for the statistics and the report of a published shape.

    python benchmarks/bench_inspect.py [--preset v51-110M-1] [--passages 32] [--length 1024] [--device cpu]
        [--output FILE]

Weights and tokens are random: speed does not depend on them. Before anything is timed, the statistics of one head are
compared with those computed from its tensors one by one; a benchmark of a wrong answer stops there.

The floor is the time of the decoder stack's matrix products alone, 2 · (parameters used for each token) · tokens, at
the measured rate of a matrix product of that width. The target is two minutes on two CPU cores. Where other jobs share
the cores, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait for each other take the time that they need.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
from conditions import conditions, record

from pldr import PldrConfig, PldrForCausalLM, deductive_outputs
from pldr.study.page import report
from pldr.study.statistics import analyse_model

TARGET = 120.0


def check(model, passages) -> None:
    """The determinant, rank and variation of one head, by hand."""
    analysis = analyse_model(model, passages, growth_passages=0)
    G_LM = deductive_outputs(model, passages).G_LM[1, :, 2].double().cpu()
    statistics = analysis.tensors["G_LM"]
    expected = torch.stack([torch.linalg.slogdet(X).logabsdet for X in G_LM]).mean() / torch.tensor(10.0).double().log()
    assert abs(float(statistics.log10_determinant[1, 2] - expected)) < 1e-6
    spectra = [torch.linalg.svd(X).S for X in G_LM]
    ranks = [int((spectrum > 1e-2 * spectrum[0]).sum()) for spectrum in spectra]
    assert float(statistics.rank[1e-2][1, 2]) == sum(ranks) / len(ranks)
    difference = (G_LM - G_LM.mean(0)).square().mean().sqrt() / G_LM.mean(0).square().mean().sqrt()
    assert abs(float(statistics.variation[1, 2] - difference)) < 1e-6 * float(difference)


def flops_a_second(width: int) -> float:
    """Of a square matrix product of this width, rows of 4,096."""
    x, weight = torch.randn(4096, width), torch.randn(width, width)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        x @ weight
        times.append(time.perf_counter() - start)
    return 2 * x.numel() * width / min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--preset", default="v51-110M-1")
    parser.add_argument("--passages", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()

    torch.manual_seed(0)
    model = PldrForCausalLM(PldrConfig.preset(arguments.preset)).eval().to(arguments.device)
    config = model.config
    passages = torch.randint(4, config.vocab_size, (arguments.passages, arguments.length))
    check(model, passages[:2, :64])

    load = os.getloadavg()[0]
    start, cpu = time.perf_counter(), time.process_time()
    analysis = analyse_model(model, passages)
    statistics_seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        file.write_text(report(analysis, title=arguments.preset), encoding="utf-8")
        size = file.stat().st_size
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu

    tokens = passages.numel() + sum(analysis.lengths[:-1]) * analysis.growth_passages
    used = sum(p.numel() for n, p in model.model.layers.named_parameters() if ".operator." not in n)
    result = {
        "benchmark": "inspect",
        "preset": arguments.preset, "passages": arguments.passages, "length": arguments.length, "dtype": "float32",
        "growth_passages": analysis.growth_passages,
        "seconds": seconds, "statistics_seconds": statistics_seconds, "report_seconds": seconds - statistics_seconds,
        "cpu_seconds": cpu, "load_average_before": load,
        "target_seconds": TARGET, "within_target": seconds < TARGET, "report_bytes": size,
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
    } | conditions(arguments.device)  # fmt: skip
    if arguments.device == "cpu":
        result["floor_seconds"] = 2 * used * tokens / flops_a_second(config.hidden_size)
        print(f"floor of the matrix products: {result['floor_seconds']:.1f} s")
    print(f"statistics {statistics_seconds:.1f} s, report {seconds - statistics_seconds:.1f} s ({size / 1e6:.1f} MB), "
          f"target {TARGET:.0f} s, load average before: {load:.1f}")  # fmt: skip
    record(result, arguments.output)


if __name__ == "__main__":
    main()
