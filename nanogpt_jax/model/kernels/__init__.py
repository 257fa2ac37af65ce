"""Fast kernels for CPUs. gpt2.py, attention.py and training/ import nothing but their names. See README.md."""
