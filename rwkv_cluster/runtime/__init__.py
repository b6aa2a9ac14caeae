"""This process and its machine: ranks, signals, locks, heartbeats, disk errors, memory."""
