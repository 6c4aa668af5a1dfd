"""What is trained on. Read batches.py; the other files are about formats and tokenizers."""
