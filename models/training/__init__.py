"""Training of the embedded bundle from drawn parts: pictures, token table, CLIP, SAM, and the bundle's folder."""
