"""Text to token ids: WordPiece, SentencePiece and tokenizer.json behind one class."""
