"""Training data. Read batches.py; the other files are about formats and tokenizers."""
