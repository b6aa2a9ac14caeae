"""Everything that a run records: metrics, events, timings, logs, profiles."""
