"""The CPU suite: families and peers, settings, goals, pictures; run.py makes the result."""
