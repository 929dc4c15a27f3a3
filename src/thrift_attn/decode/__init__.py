"""Decode on a GPU: the newest tokens over the pages of a cache."""
