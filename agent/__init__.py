"""The agent: command line, wiring, the frame's way, verdicts, journal, wire, preview and health."""
