"""Files on disk: written whole, read within limits, known by their digests."""
