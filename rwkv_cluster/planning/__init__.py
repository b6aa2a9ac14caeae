"""What a run will be, from its configuration alone: length, parameters, memory, disk, time. Imports no torch."""
