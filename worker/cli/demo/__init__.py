"""The demo: the main job on real parts, told as a story and checked at its end."""
