"""Protocols: many small trainings by one plan, their statistics and their report."""
