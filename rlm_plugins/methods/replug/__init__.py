"""REPLUG and its kin: see each module."""
