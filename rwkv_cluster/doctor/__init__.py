"""`rwkv-cluster doctor`: what this machine, or a whole job, has for training, and the first thing to fix."""
