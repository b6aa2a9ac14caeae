"""Output to a person: log lines, progress with the time left, and text that is safe to print."""
