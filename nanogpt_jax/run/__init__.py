"""The run directory: who may write there, what it holds, and how it is opened."""
