"""Lightning callbacks: progress, sample grids, validation, records, checkpoints, faults."""
