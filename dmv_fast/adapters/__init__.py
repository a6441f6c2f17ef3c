"""FastDMVTracker behind the interfaces of other hosts, one file a host: docs/adapters.md.

Nothing is imported here: each file needs its own host and no other.
"""
