"""Settings and the tree of errors. Read by every layer, imports none.

Kept empty on purpose: `cache/` and `engine/` must run where pydantic is not installed, and they read
`configs.errors` only.
"""
