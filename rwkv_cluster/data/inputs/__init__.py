"""Input files: which ones `data.inputs` means, what kind each is, and its documents."""
