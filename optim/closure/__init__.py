"""Evaluate a user's closure: record and value mode; the known losses."""
