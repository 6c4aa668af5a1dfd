"""GPT-2 small's training step in PyTorch, for gpu_vs_pytorch.py; any Python with PyTorch runs it.

    python benchmarks/torch_gpt2.py    # the last line it prints holds its figures, as JSON

The model is GPT-2 (Radford et al., 2019): learned positions, LayerNorm, GELU, biases, and a head
that is the token table. It trains as nanoGPT does on a GPU: compiled, flash attention, bfloat16
autocast over float32 weights, TF32 elsewhere, gradients added up over micro-batches and clipped to
norm 1, fused AdamW. The tokens are random, the same in every step, and on the device beforehand:
no reading is timed. Without a GPU all of this runs on the CPU, not compiled.

B batch, T sequence, D width, N heads, H head size, F MLP width, V vocabulary, L layers.
"""

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 50304  # V: GPT-2's 50,257 tokens, padded to a multiple of 128


@dataclass(frozen=True)
class Settings:
    """What is trained and timed. Each is an option of the command line."""

    layers: int = 12  # L
    heads: int = 12  # N
    width: int = 768  # D
    sequence_length: int = 1024  # T
    batch_size: int = 64  # B, rows per forward and backward pass
    total_batch_size: int = 524_288  # tokens per optimizer step
    warm_up: int = 5  # steps that are not timed; the first one compiles
    steps: int = 20  # steps that are


class Attention(nn.Module):
    """Causal attention of N heads."""

    def __init__(self, D: int, N: int):
        super().__init__()
        self.N = N
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.N, D // self.N)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # [B, N, T, H]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(B, T, D))


class Block(nn.Module):
    """Attention, then an MLP of width F = 4D, each on the normalised stream and added to it."""

    def __init__(self, D: int, N: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attention = Attention(D, N)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT2(nn.Module):
    """The network, up to the mean loss."""

    def __init__(self, settings: Settings):
        super().__init__()
        L, D, N = settings.layers, settings.width, settings.heads
        self.tokens = nn.Embedding(VOCABULARY, D)
        self.places = nn.Embedding(settings.sequence_length, D)
        self.blocks = nn.ModuleList(Block(D, N) for _ in range(L))
        self.norm = nn.LayerNorm(D)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # what adds to the stream starts smaller, so that its sum does not grow
                adds = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * L) ** 0.5 if adds else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.places.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)  # [B, T, V]
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def main() -> None:
    """Train for a few steps; print one line of JSON."""
    parser = argparse.ArgumentParser(description="Time GPT-2 small's training step in PyTorch.")
    for field in fields(Settings):
        option = "--" + field.name.replace("_", "-")
        parser.add_argument(option, type=int, default=field.default)
    settings = Settings(**vars(parser.parse_args()))
    B, T = settings.batch_size, settings.sequence_length
    Ng = settings.total_batch_size // (B * T)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")  # TF32
    model = GPT2(settings).to(device)
    loss_of = torch.compile(model) if device == "cuda" else model
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, 6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(50257, (Ng, B, T + 1), device=device)
    inputs, targets = tokens[..., :-1].contiguous(), tokens[..., 1:].contiguous()

    def step() -> float:
        total = torch.zeros((), device=device)
        for x, y in zip(inputs, targets, strict=True):
            with torch.autocast(device, torch.bfloat16):
                loss = loss_of(x, y) / Ng
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.item()  # waits for all of the above: the device works in order

    seconds, losses = [], []
    for _ in range(settings.warm_up + settings.steps):
        started = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds[settings.warm_up :])
    figures = {
        "tokens_per_s": settings.total_batch_size / median,
        "ms_per_step": 1e3 * median,
        "first_step_s": seconds[0],
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": VOCABULARY,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    print(json.dumps(figures | asdict(settings)))


if __name__ == "__main__":
    main()
