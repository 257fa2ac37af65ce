"""GPT-2 in other formats: reads and writes Hugging Face's files, writes GGUF."""
