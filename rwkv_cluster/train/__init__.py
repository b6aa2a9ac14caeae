"""Training: `run` tells the story, the other modules are its words."""
