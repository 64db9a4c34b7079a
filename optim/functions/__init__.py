"""Functional front ends."""
