"""Measurement of quality and speed, and the gate that judges them."""
