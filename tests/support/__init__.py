"""Helpers that tests share: they import from here, never from one another."""
