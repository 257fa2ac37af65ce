"""GPT-2 in plain numpy and float64, the reference of record: as short and as literal as the papers allow.

Takes the parameter tree of nanogpt_jax/model/gpt2.py and shares no code with it.
"""

# B batch, T time, C channels, H heads, D head dim, V vocab

import numpy as np


def layer_norm(p, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-5) * p["scale"] + p.get("bias", 0)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def gelu(x):
    """The tanh form (Hendrycks and Gimpel 2016), which is the one GPT-2 has."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attend(q, k, v):
    """softmax(QKᵀ/√d_k)V for one head of one sequence, each [T, D]; no position looks ahead."""
    T, d_k = q.shape
    scores = q @ k.T / np.sqrt(d_k)
    scores[np.triu_indices(T, 1)] = -np.inf
    return softmax(scores) @ v


def attention(p, x):
    c_attn, c_proj = p["c_attn"], p["c_proj"]
    qkv = np.einsum("btc,cnhd->nbhtd", x, c_attn["kernel"])
    qkv = qkv + np.asarray(c_attn.get("bias", np.zeros((3, 1, 1))))[:, None, :, None, :]
    heads = np.array([[attend(*qkv[:, b, h]) for h in range(qkv.shape[2])] for b in range(len(x))])  # [B, H, T, D]
    return np.einsum("bhtd,hdc->btc", heads, c_proj["kernel"]) + c_proj.get("bias", 0)


def mlp(p, x):
    x = gelu(x @ p["c_fc"]["kernel"] + p["c_fc"].get("bias", 0))
    return x @ p["c_proj"]["kernel"] + p["c_proj"].get("bias", 0)


def pick(tree, layer: int):
    """One layer of the stacked layers, in float64."""
    if isinstance(tree, dict):
        return {name: pick(p, layer) for name, p in tree.items()}
    return np.asarray(tree[layer], np.float64)


def forward(params, tokens, n_vocab: int):
    """tokens [B, T] -> logits [B, T, n_vocab]."""
    wte, wpe = (np.asarray(params[name], np.float64) for name in ("wte", "wpe"))
    x = wte[tokens] + wpe[: tokens.shape[1]]
    for layer in range(len(params["h"]["ln_1"]["scale"])):
        block = pick(params["h"], layer)
        x = x + attention(block["attn"], layer_norm(block["ln_1"], x))
        x = x + mlp(block["mlp"], layer_norm(block["ln_2"], x))
    ln_f = {name: np.asarray(p, np.float64) for name, p in params["ln_f"].items()}
    return layer_norm(ln_f, x) @ wte[:n_vocab].T
