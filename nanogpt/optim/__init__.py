"""How parameters learn. Read muon.py; groups.py chooses a rule and a rate for each parameter."""
