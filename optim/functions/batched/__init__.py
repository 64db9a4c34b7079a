"""Thousands of small problems at once, along the first dimension."""
