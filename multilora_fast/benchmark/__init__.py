"""Layers timed beside their peers."""
