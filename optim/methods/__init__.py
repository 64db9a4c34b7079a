"""The algorithm without a face: knows no closure."""
