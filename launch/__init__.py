"""From a configuration to a command, and from there to a process. Needs no GPU, never imports torch."""
