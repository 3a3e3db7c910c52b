"""Harnesses of the reliability goals: small in a test run, as large as asked for by ``scripts/goals.py``."""
