"""Lightning callbacks. after_step.py says what happens after each optimizer step, in order."""
