"""What if: a recording replayed with the real scheduler on a simulated clock, with something changed."""
