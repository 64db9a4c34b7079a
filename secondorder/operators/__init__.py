"""``A @ v`` on flat vectors: algebra, curvature matrices with respect to parameters."""
