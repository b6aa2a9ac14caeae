"""The optimizers: a table of what each keeps, and a file with how each is built."""
