"""The parts of `benches/frontier.py`."""
