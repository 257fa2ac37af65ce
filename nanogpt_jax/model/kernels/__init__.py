"""What makes a CPU's step fast, behind the names that gpt2.py, attention.py and step.py import. See README.md."""
