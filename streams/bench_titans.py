"""titans-pytorch (0.5.5), set up so that it does what ours does, where it is installed.

Its memory learns online only if `batch_size` is set: without it every gradient is taken at the
initial weights for ever. Its largest step is 0.01 here: with the default, 1, it ends in NaN within
2,048 tokens of noise. Its own `chunk_size` is how often the weights that are read change:

    per chunk   chunk_size = batch_size = C
    per token   chunk_size = 1, batch_size = C: a token reads weights of its own that have learned
                it, gradients are taken at those of the chunk's start. This is what ours computes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from wakesleep.streams.bench_measure import Unequal
from wakesleep.ttl.model import ModelConfig

EXPANSION = 2  # hidden width of a memory over that of its head, theirs and ours
LARGEST_STEP = 0.01
MEMORY = {
    "momentum": True,
    "qk_rmsnorm": True,
    "default_step_transform_max_lr": LARGEST_STEP,
    "default_model_kwargs": {"depth": 2, "expansion_factor": float(EXPANSION)},
}
LOOSE = 1e-4  # float32 logits about 1, of two ways to compute them


class TitansLayer(nn.Module):
    """Its memory; with one head, plus the gate and projection that it has with more."""

    def __init__(self, num_heads: int, head_dim: int, chunk: int, batch: int) -> None:
        from titans_pytorch import NeuralMemory

        super().__init__()
        dim = num_heads * head_dim
        self.memory = NeuralMemory(
            dim=dim,
            heads=num_heads,
            dim_head=head_dim,
            chunk_size=chunk,
            batch_size=batch,
            pre_rmsnorm=False,
            post_rmsnorm=True,
            **MEMORY,
        )
        self.gate = nn.Linear(dim, 1) if num_heads == 1 else None
        self.out = nn.Linear(dim, dim, bias=False) if num_heads == 1 else None
        self.dim = dim

    @property
    def num_weights(self) -> int:
        return sum(p.numel() for p in self.memory.memory_model_parameters)

    def forward(self, x: Tensor, carried: Any) -> tuple[Tensor, Any]:
        y, carried = self.memory(x, state=carried)
        if self.out is not None:
            y = self.out(y * self.gate(x).sigmoid())
        return y, carried


def titans_transformer(config: ModelConfig) -> nn.Module:
    """Its MAC transformer with the sizes of a model of ours: widths, heads, layers, window, memory.

    Its attention slides as ours does; residual streams, which ours has not, are one.
    """
    from titans_pytorch import MemoryAsContextTransformer

    heads = {"heads": config.num_heads, "dim_head": config.head_dim}
    return MemoryAsContextTransformer(
        num_tokens=config.vocab_size,
        dim=config.dim,
        depth=config.num_layers,
        segment_len=config.window,
        sliding_window_attn=True,
        num_residual_streams=1,
        ff_mult=config.mlp_dim * 3 / 2 / config.dim,
        neural_memory_layers=tuple(layer + 1 for layer in config.memory_layers),
        neural_memory_segment_len=config.chunk,
        neural_memory_batch_size=config.chunk,
        neural_memory_kwargs={**MEMORY, **heads},
        **heads,
    ).eval()


@torch.inference_mode()
def check_online(theirs: TitansLayer, chunk: int, seed: int) -> str:
    """See that noise moves the weights of gradients, and a chunk the outputs of the next one.

    Raises:
        Unequal: gradients are still taken at the initial weights, or nothing is learned.
    """
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 2 * chunk, theirs.dim, generator=draw)
    y, state = theirs(x, None)
    if not _moved(state, theirs.memory):
        raise Unequal("titans-pytorch takes its gradients at the initial weights: not online")
    other = x.clone()
    other[:, :chunk] = torch.randn(x[:, :chunk].shape, generator=draw)
    changed, _ = theirs(other, None)
    if torch.equal(changed[:, chunk], y[:, chunk]):
        raise Unequal("what titans-pytorch reads in a chunk does not reach the next one")
    return "its weights move, and a chunk reaches the next one"


@torch.inference_mode()
def check_transformer(model: nn.Module, config: ModelConfig, seed: int) -> str:
    """See that its memory learns online, and that decoding gives what one long call gives.

    Raises:
        Unequal: one of the two is not so.
    """
    draw = torch.Generator().manual_seed(seed)
    length = 4 * config.chunk + 3
    ids = torch.randint(config.vocab_size, (1, length), generator=draw)
    whole = model(ids)
    logits, cache = model(ids[:, : length - 5], return_cache=True)
    rows = [logits[:, -1]]
    for end in range(length - 4, length + 1):
        logits, cache = model(ids[:, :end], cache=cache, return_cache=True)
        rows.append(logits[:, -1])
    memories = [layer[4] for layer in model.layers if layer[4] is not None]
    if not all(_moved(state, m) for state, m in zip(cache[2], memories, strict=True)):
        raise Unequal("titans-pytorch takes its gradients at the initial weights: not online")
    deviation = float((torch.stack(rows, 1) - whole[:, length - 6 :]).abs().max())
    if not deviation <= LOOSE:
        raise Unequal(f"titans-pytorch decodes {deviation:.1e} from what one call gives")
    return f"its weights move, and decoding gives what one call gives, within {deviation:.0e}"


def _moved(state: Any, memory: nn.Module) -> bool:
    """Whether gradients are taken at other weights than the initial ones."""
    pairs = zip(state.weights.values(), memory.memory_model_parameters, strict=True)
    return not all(torch.equal(now[0], initial) for now, initial in pairs)
