"""Ranks of one process and what travels between them. This package alone knows how ranks are ordered in time."""
