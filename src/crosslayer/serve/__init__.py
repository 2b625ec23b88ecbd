"""The server of the page: JSON about runs, feature bundles and graphs under `/api`.

Needs no torch, not even indirectly. May import `graphs` and `bundles`, and below.
"""
