"""GPT-2 as others keep it: Hugging Face's files in and out, GGUF out."""
