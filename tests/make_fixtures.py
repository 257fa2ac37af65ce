"""Makes tests/fixtures/gpt2_odd.safetensors: a small transformers GPT-2, tokens, its logits and its gradients.

    pip install -e '.[test,compare]' && python tests/make_fixtures.py

The tests read the file, so that they need neither torch nor transformers.
"""

from pathlib import Path

import torch
from safetensors.numpy import save_file
from transformers import GPT2Config, GPT2LMHeadModel

PATH = Path(__file__).parent / "fixtures" / "gpt2_odd.safetensors"


def make_model(seed: int, *, n_layer: int, n_head: int, n_embd: int, vocab_size: int, n_positions: int):
    """A random GPT2LMHeadModel in which every parameter matters: no zero bias, no unit scale, large weights."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_embd=n_embd,
            n_layer=n_layer,
            n_head=n_head,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            attn_implementation="eager",
            bos_token_id=0,
            eos_token_id=0,
        )
    ).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if ".ln_" in name and name.endswith("weight") else 0.0, 0.2)
        # a short vector, beside which the layer norm's epsilon is not nothing
        model.transformer.wte.weight[0] *= 0.05
        model.transformer.wpe.weight[0] *= 0.05
    return model


def run(model, seed: int, batch_size: int) -> dict:
    """Weights, tokens [B, T+1], logits [B, T, V] and the gradients of the mean cross-entropy, as numpy arrays."""
    config = model.config
    shape = (batch_size, config.n_positions + 1)
    tokens = torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))
    tokens[0, 0] = 0
    logits = model(tokens[:, :-1]).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    arrays = {"tokens": tokens.int().numpy(), "logits": logits.detach().numpy()}
    for name, p in model.named_parameters():  # the tied head is listed once, as wte
        name = name.removeprefix("transformer.")
        arrays["weight." + name] = p.detach().numpy()
        arrays["grad." + name] = p.grad.numpy()
    return arrays


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    model = make_model(0, n_layer=3, n_head=5, n_embd=20, vocab_size=131, n_positions=19)
    save_file(run(model, 1, batch_size=2), PATH)
    print(f"{PATH}: {PATH.stat().st_size} bytes")
