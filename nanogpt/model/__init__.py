"""The model. Read gpt.py, then loss.py; the other files make them fast or serve sampling."""
