"""The server of the page: JSON about runs, feature bundles and graphs under `/api`. No torch, not even indirectly.

May import what knows no torch of `features` and `graph`, and `records` and `core`.
"""
