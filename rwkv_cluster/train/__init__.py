"""Training. Start at run.py (one run), fit.py (one session), callbacks/after_step.py (one step)."""
