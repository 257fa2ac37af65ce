"""How large a model is and what a step costs, in closed form: it allocates nothing and needs no JAX."""

# C channels, L layers, N parameters, T positions, B sequences

from nanogpt_jax.config import Config, ModelConfig


def n_params(cfg: ModelConfig) -> int:
    """Number of parameters, without the padding of the vocabulary. The head is wte again and counts once."""
    C = cfg.n_embd
    kernels, scales, biases = 12 * C * C, 2 * C, 11 * C  # c_attn 3, c_proj 1, c_fc 4, c_proj 4; ln_1, ln_2
    block = kernels + scales + (biases if cfg.bias else 0)
    ends = (cfg.vocab_size + cfg.block_size) * C + (2 * C if cfg.bias else C)  # wte, wpe, ln_f
    return cfg.n_layer * block + ends


def flops_per_token(cfg: ModelConfig) -> float:
    """Floating-point operations a token of a training step: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).

    N excludes the position embeddings, which are in no product.
    """
    n_products = n_params(cfg) - cfg.block_size * cfg.n_embd
    return 6 * n_products + 12 * cfg.n_layer * cfg.n_embd * cfg.block_size


def product_flops(cfg: Config) -> float:
    """Floating-point operations of a step, without attention: 6 for each parameter and token."""
    return 6 * n_params(cfg.model) * cfg.train.batch_size * cfg.model.block_size
