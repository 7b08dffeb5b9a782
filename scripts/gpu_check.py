"""Check the Triton kernels on this machine's GPU, then time them against its roofline.

    python scripts/gpu_check.py                # needs a CUDA device
    python scripts/gpu_check.py --interpret    # tiny sizes in Triton's interpreter, on a CPU

Every kernel must first equal the PyTorch form in float64, or it is not timed; the model must give
the same with and without kernels at position 10M. So are the gradients that a kernel has.

What a kernel moves and multiplies at least, its bytes over the bandwidth and its FLOPs over the
rate of the tensor cores, whichever takes longer, is the roofline; both rates are measured first, on
a copy and on a product of matrices. float32 runs as three tf32 products: a third is its best share.

The exit code is 1 if anything differs, 2 if there is no device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCES = {torch.float32: 5e-5, torch.float16: 5e-3, torch.bfloat16: 3e-2}
GRADIENT_TOLERANCE = 1e-3  # of the largest gradient of the same tensor, in float32
MODEL_TOLERANCE = 2e-3  # of float32 logits, which are below 10
FAR = 10_000_000  # tokens read before the model is compared
SIZES = {  # lanes, heads, chunk, window, places, head width, chunks of a call
    False: [(64, 4, 64, 256, 3072, 64, 16), (1, 3, 64, 256, 3072, 64, 16),
            (3, 2, 61, 200, 777, 64, 3), (2, 2, 1, 16, 5, 16, 2)],
    True: [(2, 2, 17, 16, 35, 16, 2)],
}  # fmt: skip
REPEATS = 50


class Case(NamedTuple):
    name: str
    size: tuple[int, ...]
    dtype: torch.dtype
    kernel: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[], tuple[Tensor, ...]]  # PyTorch's form in the same dtype
    exact: tuple[Tensor, ...]
    num_bytes: int
    flops: int


class Peaks(NamedTuple):
    bandwidth: float  # bytes/s
    rates: dict[torch.dtype, float]  # FLOP/s; of float32 with tf32 products


def softmax_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """A chunk that reads sink, window and a store of which a tenth is empty."""
    from wakesleep.kernels.softmax_read import softmax_read
    from wakesleep.kernels.softmax_read_triton import softmax_read_triton

    B, H, C, W, S, K, _ = size
    R, near = K // 4, 1 + W + C
    L = near + S
    q, keys = torch.randn(B, H, C, K + R) * 0.5, torch.randn(B, H, L, K + R)
    v, sink = torch.randn(B, H, L, K), torch.randn(H)
    v[:, :, 0] = 0
    bias = torch.zeros(B, H, 1, L).masked_fill(torch.rand(B, H, 1, L) < 0.1, -torch.inf)
    q, keys, v, sink, bias = (x.to(device, dtype) for x in (q, keys, v, sink, bias))
    rest = (sink, near - C, bias)

    def plain(q: Tensor, keys: Tensor, v: Tensor, sink: Tensor) -> tuple[Tensor]:
        pieces = [v[:, :, :near], v[:, :, near:]]
        return (softmax_read(q @ keys.mT, pieces, sink, near - C, bias)[0],)

    return Case(
        "softmax_read", size, dtype,
        lambda: (softmax_read_triton(q, keys, [v[:, :, :near], v[:, :, near:]], *rest),),
        lambda: plain(q, keys, v, sink),
        plain(*(x.double() for x in (q, keys, v, sink))),
        sum(x.numel() * x.element_size() for x in (q, keys, v, bias)) + q[..., :K].nbytes,
        2 * B * H * C * L * (2 * K + R),
    )  # fmt: skip


def delta_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """All chunks of a call, every token written; the state is float32 in every dtype."""
    from wakesleep.kernels.delta_rule import DeltaMemory
    from wakesleep.kernels.delta_rule_triton import delta_rule_triton
    from wakesleep.kernels.memory_chunk import Chunks
    from wakesleep.ttl.memory_scan import scan

    B, H, C, _, _, K, N = size
    X = B * H
    q, k = (F.normalize(torch.randn(N, X, C, K), dim=-1).to(device, dtype) for _ in range(2))
    v, state = torch.randn(N, X, C, K).to(device, dtype), torch.randn(X, K, K).to(device)
    keep, step = (torch.rand(N, X, C).to(device) ** power for power in (0.05, 1.0))
    live = torch.ones(N, B, C, dtype=torch.bool, device=device)
    closed = live[:, :, 0]

    def plain(*tensors: Tensor) -> tuple[Tensor, ...]:
        state, q, k, v, keep, step = tensors
        chunks = Chunks(q, k, v, keep, None, step, live, closed)
        run = scan(DeltaMemory(), (state,), chunks, state.new_zeros(B, 2))
        return run.y, run.stacks[0], run.surprise

    of = (state, q, k, v, keep, step)
    single = [x.float() for x in of]
    return Case(
        "delta_rule", size, dtype,
        lambda: delta_rule_triton(*of, live, closed),
        lambda: plain(*single),
        plain(*(x.double() for x in of)),
        sum(x.nbytes for x in (q, k, v, q, keep, step, keep)) + 2 * state.nbytes,
        X * N * 2 * C * (3 * K * K + 2 * C * K + C * C),
    )  # fmt: skip


def mlp_inputs(size: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
    """Base, gamma, bias and stacks, tokens of `dtype`, gates; what a gradient reaches."""
    B, H, C, _, _, K, N = size
    X, h = B * H, 2 * K
    base = [torch.randn(X, K, h), torch.randn(X, h, K) / h]
    slow = [torch.rand(X, 1, K) + 0.5, torch.randn(X, 1, K) * 0.1]
    stacks = [0.01 * torch.cat([w, w.flip(0)], 1) for w in base]
    q, k = (F.normalize(torch.randn(N, X, C, K), dim=-1).to(dtype) for _ in range(2))
    gates = [torch.rand(N, X, C) ** power for power in (0.05, 1.0, 1.0)]
    inputs = [*base, *slow, *stacks, q, k, torch.randn(N, X, C, K).to(dtype), *gates]
    return [x.to(device) for x in inputs]


def run_mlp(inputs: list[Tensor], lanes: int, kernel: bool) -> tuple[Tensor, ...]:
    """y, stacks and surprise, every token written."""
    from wakesleep.kernels.memory_chunk import Chunks, MLPMemory
    from wakesleep.kernels.mlp_autograd_triton import mlp_scan
    from wakesleep.ttl.memory_scan import scan

    N, _, C, K = inputs[7].shape
    memory = MLPMemory(C, 0.1, K**0.5, tuple(inputs[:2]), *inputs[2:4])
    live = torch.ones(N, lanes, C, dtype=torch.bool, device=inputs[0].device)
    stacks, chunks = tuple(inputs[4:6]), Chunks(*inputs[6:], live, live[:, :, 0])
    if kernel:
        y, stacks, surprise = mlp_scan(memory, stacks, chunks)
        return y, *stacks, surprise
    run = scan(memory, stacks, chunks, inputs[0].new_zeros(lanes, 2))
    return run.y, *run.stacks, run.surprise


def mlp_case(size: tuple[int, ...], dtype: torch.dtype, device: str) -> Case:
    """All chunks of a call; the weights are float32 in every dtype."""
    B, H, C, _, _, K, N = size
    h, inputs = 2 * K, mlp_inputs(size, dtype, device)
    single, double = [x.float() for x in inputs], [x.double() for x in inputs]
    kept = [*inputs, *inputs[4:6], inputs[6], inputs[9]]  # stacks, y and surprise are written
    return Case(
        "mlp_scan", size, dtype,
        lambda: run_mlp(inputs, B, kernel=True),
        lambda: run_mlp(single, B, kernel=False),
        run_mlp(double, B, kernel=False),
        sum(x.nbytes for x in kept),
        B * H * N * 2 * (h * (13 * C * K + 3 * C * C + K * K) + C * C * (3 * K + C)),
    )  # fmt: skip


@torch.enable_grad()
def mlp_gradients(inputs: list[Tensor], lanes: int, kernel: bool) -> tuple[Tensor, ...]:
    """Of all inputs, through both passes."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = run_mlp(leaves, lanes, kernel)[:3]
    return torch.autograd.grad(sum(y.square().sum() for y in results), leaves)


def gradient_row(size: tuple[int, ...], device: str, timed: bool) -> tuple[str, bool]:
    """One line of the table of gradients, and whether they are right."""
    inputs = mlp_inputs(size, torch.float32, device)
    exact = mlp_gradients([x.double() for x in inputs], size[0], kernel=False)
    error = 0.0
    for x, y in zip(mlp_gradients(inputs, size[0], kernel=True), exact, strict=True):
        bound = GRADIENT_TOLERANCE * float(y.abs().max())
        error = max(error, float(((x - y).abs() / bound).nan_to_num(1e9).max()))
    cells = ["-", "-"]
    if timed and error <= 1:
        taken, plain = (
            seconds(lambda kernel=kernel: mlp_gradients(inputs, size[0], kernel))
            for kernel in (True, False)
        )
        cells = [f"{taken * 1e6:.0f}", f"{plain / taken:.2f}"]
    cells = ["mlp_scan", "x".join(map(str, size)), f"{error:.2f}", *cells]
    return "| " + " | ".join(cells) + " |", error <= 1


def largest_error(case: Case) -> float:
    """Of all results, in units of the tolerance: above 1 is wrong."""
    errors = []
    for found, exact in zip(case.kernel(), case.exact, strict=True):
        bound = TOLERANCES[case.dtype] * (1 + exact.abs())
        errors.append(float(((found.double() - exact).abs() / bound).nan_to_num(1e9).max()))
    return max(errors)


def model_difference(device: str, tiny: bool) -> float:
    """Largest difference of logits at position FAR, with kernels and without."""
    from wakesleep.ttl.fast import FastConfig
    from wakesleep.ttl.model import ModelConfig, TTLModel
    from wakesleep.ttl.store import StoreConfig

    sizes = {"head_dim": 16, "window": 16, "chunk": 8} if tiny else {}
    store = StoreConfig(capacity=24 if tiny else 512)
    config = ModelConfig(dim=64, num_layers=2, num_heads=2, mlp_dim=64, memory_layers=(0,),
                         store_layers=(0,), fast_layers=(1,), fast=FastConfig(write="always"),
                         store=store, **sizes)  # fmt: skip
    model = TTLModel(config).to(device)
    calls = torch.randint(config.vocab_size, (5, 2, 3 * config.chunk + 1)).to(device)

    def stream(setting: str) -> Tensor:
        os.environ["WAKESLEEP_KERNELS"] = setting
        state, logits = model.init_state(2), []
        state = state._replace(position=state.position + FAR)
        for tokens in calls:
            y, state, _ = model(tokens, state)
            logits.append(y)
        return torch.cat(logits, 1)

    return float((stream("triton") - stream("torch")).abs().nan_to_num(1e9).max())


def seconds(run: Callable[[], object]) -> float:
    """Median time of a call, warmed up, by the device's own clock."""
    for _ in range(5):
        run()
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return statistics.median(times)


def measure_peaks(dtypes: list[torch.dtype]) -> Peaks:
    """What this device reaches in a copy of 1 GiB and in products of 8192 x 8192."""
    source = torch.empty(2**28, device="cuda")
    target = torch.empty_like(source)
    bandwidth = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    rates, precision = {}, torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for dtype in dtypes:
        a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        rates[dtype] = 2 * 8192**3 / seconds(lambda a=a: a @ a)
    torch.set_float32_matmul_precision(precision)
    return Peaks(bandwidth, rates)


def row(case: Case, error: float, peaks: Peaks | None) -> str:
    """One line of the table; times are of kernels that are right."""
    cells = [case.name, "x".join(map(str, case.size)), str(case.dtype)[6:], f"{error:.2f}"]
    if peaks is None or error > 1:
        return "| " + " | ".join([*cells, "-", "-", "-"]) + " |"
    taken, plain = seconds(case.kernel), seconds(case.plain)
    # memories multiply in float32 whatever their tokens are
    rate = peaks.rates[case.dtype if case.name == "softmax_read" else torch.float32]
    least = max(case.num_bytes / peaks.bandwidth, case.flops / rate)
    cells += [f"{taken * 1e6:.0f}", f"{plain / taken:.2f}", f"{least / taken:.0%}"]
    return "| " + " | ".join(cells) + " |"


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Check, time and print; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interpret", action="store_true", help="tiny sizes, on a CPU, no times")
    tiny = parser.parse_args(argv).interpret
    if tiny:
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported
    elif not torch.cuda.is_available():
        print("no CUDA device here; --interpret checks tiny sizes on a CPU")
        return 2
    os.environ["WAKESLEEP_KERNELS"] = "torch"  # what is called by its name runs all the same
    device = "cpu" if tiny else "cuda"
    dtypes = [torch.float32, torch.float16 if tiny else torch.bfloat16]
    torch.manual_seed(0)
    makers = (softmax_case, delta_case, mlp_case)
    cases = (make(size, t, device) for make in makers for size in SIZES[tiny] for t in dtypes)
    peaks = None if tiny else measure_peaks(dtypes)
    if peaks is None:
        print("Triton's interpreter on a CPU: no speed was measured")
    else:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
        rates = ", ".join(f"{str(t)[6:]} {rate / 1e12:.0f}" for t, rate in peaks.rates.items())
        print(f"bandwidth {peaks.bandwidth / 1e9:.0f} GB/s; TFLOP/s: {rates} (float32 as tf32)")
    print("\nlanes x heads x chunk x window x places x head width x chunks of a call\n")
    print("| kernel | size | dtype | error / tolerance | us | PyTorch / it | of the roofline |")
    print("|---|---|---|--:|--:|--:|--:|")
    right = True
    for case in cases:
        error = largest_error(case)
        right &= error <= 1
        print(row(case, error, peaks), flush=True)
    difference = model_difference(device, tiny)
    right &= difference <= MODEL_TOLERANCE
    print(
        f"\nmodel at position {FAR:,}: logits with and without kernels differ by {difference:.1e}"
    )
    print("\nforward and backward pass, float32; no other kernel has gradients\n")
    print("| kernel | size | error / tolerance | us | PyTorch / it |")
    print("|---|---|--:|--:|--:|")
    for size in SIZES[tiny]:
        line, fits = gradient_row(size, device, timed=not tiny)
        right &= fits
        print(line, flush=True)
    print()
    print("all equal" if right else "WRONG: see above")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
