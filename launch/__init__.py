"""Turn a configuration into a command, and a command into a process. Needs no GPU, never imports torch."""
