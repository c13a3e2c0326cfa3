"""The bench: cases measured in turn with floors of the same machine and minute. It reports, it asserts no speed."""
