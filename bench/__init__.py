"""Benchmarks of tollerchat: `python -m bench`, or `python -m bench NAME ...` (Linux)."""
