"""Side-by-side measurements. Every speed is a ratio of runs interleaved in one process."""
