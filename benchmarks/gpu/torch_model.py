"""GPT-2 in PyTorch (Radford et al., 2019).

Learned positions, LayerNorm, GELU, biases, and a head tied to the token embedding.
B batch, T sequence, D width, N heads, H head size, F MLP width, V vocabulary, L layers.
"""

import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 50304  # V: GPT-2's 50,257 tokens, padded to a multiple of 128


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
    """Attention, then an MLP of width F = 4D, each with a pre-norm and a residual connection."""

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

    def __init__(self, L: int, D: int, N: int, T: int):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, D)
        self.places = nn.Embedding(T, D)
        self.blocks = nn.ModuleList(Block(D, N) for _ in range(L))
        self.norm = nn.LayerNorm(D)
        for name, p in self.named_parameters():
            if p.ndim > 1:  # smaller for residual outputs, whose sum would grow with depth
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
