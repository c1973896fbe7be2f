"""Cameras: the frame, its shared-memory ring, the backends, and the generator of synthetic parts."""
