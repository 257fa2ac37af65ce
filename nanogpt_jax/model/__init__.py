"""The network: attention, GPT-2 and its loss. Pure functions of parameters and tokens, no I/O."""
