"""GPT-2 in PyTorch, only for `bench --versus torch`: what a user would otherwise run.

Same shapes, initial distribution, AdamW, clipping and micro-batches as ours; attention is PyTorch's fused one. On an
NVIDIA GPU as in nanoGPT: float32 products in TF32, as in JAX, and AdamW in one kernel.
"""

# B batch, T time, C channels, H heads, D head dim, V vocabulary

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nanogpt_jax.config import Config, ModelConfig


class Block(nn.Module):
    """x [B, T, C] -> [B, T, C]."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        C, self.H, self.dropout = cfg.n_embd, cfg.n_head, cfg.dropout
        self.ln_1, self.ln_2 = nn.LayerNorm(C, bias=cfg.bias), nn.LayerNorm(C, bias=cfg.bias)
        self.c_attn, self.attn_proj = nn.Linear(C, 3 * C, cfg.bias), nn.Linear(C, C, cfg.bias)
        self.c_fc, self.mlp_proj = nn.Linear(C, 4 * C, cfg.bias), nn.Linear(4 * C, C, cfg.bias)
        self.drop = nn.Dropout(cfg.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(self.ln_1(x)).view(B, T, 3, self.H, C // self.H).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0)
        x = x + self.drop(self.attn_proj(y.transpose(1, 2).reshape(B, T, C)))
        return x + self.drop(self.mlp_proj(F.gelu(self.c_fc(self.ln_2(x)), approximate="tanh")))


class GPT2(nn.Module):
    """tokens [B, T] -> logits [B, T, V], head tied to the embedding."""

    def __init__(self, cfg: ModelConfig, n_vocab: int):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(n_vocab, cfg.n_embd), nn.Embedding(cfg.block_size, cfg.n_embd)
        self.drop = nn.Dropout(cfg.dropout)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, bias=cfg.bias)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                nn.init.normal_(p, 0, 0.02 / (math.sqrt(2 * cfg.n_layer) if "proj" in name else 1))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.drop(self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1], device=tokens.device)))
        for block in self.h:
            x = block(x)
        return F.linear(self.ln_f(x), self.wte.weight)


def device() -> torch.device:
    """The NVIDIA GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.set_float32_matmul_precision("high")
    return torch.device("cuda")


def peak_memory() -> int:
    """Peak memory in bytes that PyTorch held on the GPU; 0 without one."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def make_step(cfg: Config, compiled: bool) -> Callable[[np.ndarray], float]:
    """tokens [B, T+1] int64 -> the loss, after one AdamW update."""
    torch.manual_seed(cfg.train.seed)
    place = device()
    padded = place.type == "cuda"  # 50257 rows are slow on a GPU; nanoGPT pads them too
    model = GPT2(cfg.model, cfg.model.padded_vocab_size if padded else cfg.model.vocab_size).to(place)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    o, micro = cfg.optim, max(cfg.train.micro_batch, 0) or cfg.train.batch_size
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = place.type == "cuda" or None
    optimizer = torch.optim.AdamW(groups, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=1e-8, fused=fused)
    call = torch.compile(model) if compiled else model

    def step(batch: np.ndarray) -> float:
        pieces = torch.from_numpy(batch).to(place).split(micro)
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=place)
        for tokens in pieces:
            with torch.autocast(place.type, torch.bfloat16, enabled=cfg.model.dtype == "bfloat16"):
                logits = call(tokens[:, :-1])
                loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)) / len(pieces)
            loss.backward()
            total += loss.detach()
        if o.grad_clip:
            nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip)
        optimizer.step()
        return total.item()

    return step


def make_generate(cfg: ModelConfig) -> Callable[[np.ndarray, int], torch.Tensor]:
    """(tokens [B, P] int64, n) -> [B, P + n]: greedy generation by transformers, with its cache of keys and values."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": cfg.n_layer, "n_head": cfg.n_head, "n_embd": cfg.n_embd}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=cfg.vocab_size, n_positions=cfg.block_size, **sizes)).train(False)
    place = device()
    model.to(place, getattr(torch, cfg.dtype))

    def generate(tokens: np.ndarray, n: int) -> torch.Tensor:
        with torch.inference_mode():
            ids = torch.from_numpy(tokens).to(place)
            return model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0).cpu()

    return generate
