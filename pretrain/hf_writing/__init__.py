"""What an export is besides its weights: folder, tokenizer, card, and what its checkpoint was trained on."""
