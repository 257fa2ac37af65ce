"""One GGUF file, as llama.cpp reads it: weights in float32, tokenizer and sizes, through the package `gguf`."""

# C channels, V vocabulary, T positions

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from nanogpt_jax.config import ModelConfig, UserError
from nanogpt_jax.data.tokenizer import END_OF_TEXT, GPT2Tokenizer, Tokenizer
from nanogpt_jax.host import files
from nanogpt_jax.interop.vocabulary import tokens_and_merges
from nanogpt_jax.model.kernels.norm_gelu import EPSILON

# Hugging Face's names, inside and outside a layer -> llama.cpp's, whose matrices are [out, in], like the embeddings.
NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def write_gguf(path: Path, name: str, cfg: ModelConfig, tensors: dict[str, np.ndarray], tokenizer: Tokenizer) -> None:
    """Write `tensors`, as `to_hugging_face` returns them, to `path`, atomically. OSError if that fails."""
    try:
        import gguf
    except ImportError:
        raise UserError("a .gguf file needs pip install 'nanogpt-jax[gguf]'") from None
    if tokenizer.end_of_text is None or not isinstance(tokenizer, GPT2Tokenizer):
        words = tokenizer.name == "word"
        raise UserError(
            f"{path} cannot be written: llama.cpp has no tokenizer of {'words' if words else 'characters'}\n"
            f"       {'' if words else 'export to a directory, for transformers, or '}train with --data.tokenizer=gpt2"
        )
    writer = gguf.GGUFWriter(None, "gpt2")
    writer.add_name(name.encode("utf-8", "replace").decode())
    writer.add_block_count(cfg.n_layer)
    writer.add_context_length(cfg.block_size)
    writer.add_embedding_length(cfg.n_embd)
    writer.add_feed_forward_length(4 * cfg.n_embd)
    writer.add_head_count(cfg.n_head)
    writer.add_layer_norm_eps(EPSILON)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)

    vocab, merges = tokens_and_merges(tokenizer)
    # ids without text in the tokenizer
    tokens = [f"[PAD{i}]" for i in range(cfg.vocab_size)]
    kinds = [gguf.TokenType.UNUSED] * cfg.vocab_size
    for symbols, rank in vocab.items():
        tokens[rank], kinds[rank] = symbols, gguf.TokenType.NORMAL
    end = tokenizer.end_of_text
    tokens[end], kinds[end] = END_OF_TEXT, gguf.TokenType.CONTROL
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([f"{left} {right}" for left, right in merges])
    writer.add_add_bos_token(False)

    for theirs, tensor in tensors.items():
        module, _, leaf = theirs.rpartition(".")
        block, layer = "", module
        if module.startswith("h."):
            _, index, layer = module.split(".", 2)
            block = f"blk.{index}."
        matrix = tensor.ndim == 2 and layer not in ("wte", "wpe")
        writer.add_tensor(
            f"{block}{NAMES[layer]}.{leaf}", np.ascontiguousarray(tensor.T if matrix else tensor).view(_Told)
        )
    with files.replacing(files.target(path)) as partial:
        try:
            writer.write_header_to_file(partial)
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
        finally:
            with contextlib.suppress(OSError):  # the same error again
                writer.close()


class _Told(np.ndarray):
    """An array that is written like bytes, so that a full disk is named; numpy says "8 requested and 0 written"."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        assert not sep
        fid.write(self.view(np.uint8).data)
