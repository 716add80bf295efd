"""Benchmarks of layers beside their peers."""
