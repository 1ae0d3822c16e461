"""The post-LN BERT encoder: layers, the wrapper for one pipeline stage, and Hugging Face names both ways."""
