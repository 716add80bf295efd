"""A small transformer trains with fused layers as with the reference, step for step."""

import copy

import torch
from torch import nn

from multilora_fast import MultiLoRALinear, fuse


class Block(nn.Module):
    def __init__(self, d=32, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=i < 3) for i in range(4))
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)

    def forward(self, x):
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


def transformer(layers=2, vocabulary=64, d=32):
    model = nn.Sequential(nn.Embedding(vocabulary, d), *(Block(d) for _ in range(layers)), nn.Linear(d, vocabulary))
    model.requires_grad_(False)
    for block in model[1:-1]:
        for name in ("q", "k", "v", "o", "up", "down"):
            setattr(block, name, MultiLoRALinear(getattr(block, name), r=4, lora_num=3, lora_alpha=8))
    return model


def losses(model, optimizer, steps=20):
    g = torch.Generator().manual_seed(1)
    out = []
    for _ in range(steps):
        tokens = (torch.randint(64, (4, 1), generator=g) + 5 * torch.arange(17)) % 64
        loss = nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        out.append(loss.item())
    return torch.tensor(out, dtype=torch.float64)


def test_losses_agree_with_an_optimizer_made_before_fuse():
    plain = transformer().double()
    fused = copy.deepcopy(plain)
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3) for model in (plain, fused)
    ]
    report = fuse(fused)
    assert len(report.swapped) == 12
    assert not report.left
    reference, ours = losses(plain, optimizers[0]), losses(fused, optimizers[1])
    assert reference[-1] < reference[0]
    torch.testing.assert_close(ours, reference, rtol=1e-9, atol=0)
    fused.load_state_dict(plain.state_dict())
