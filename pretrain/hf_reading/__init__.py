"""The folder of a saved Hugging Face model: its tensor files, values and tokenizer, read without transformers."""
