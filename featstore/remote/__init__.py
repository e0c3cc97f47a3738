"""Stores behind a URL: small files are mirrored into a local folder, shards stay where they are.

`location` says what a URL means and where its mirror lies, `client` talks to the object store (the
only door to obstore), `mirror` brings the small files here, `writing` sends ours there, `chunks`
reads rows of shards by range requests and `cache` keeps what was read, within a limit of bytes.
"""
