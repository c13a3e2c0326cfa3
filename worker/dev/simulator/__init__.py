"""A stand-in for the ElevenLabs workspace API, with a control door for tests.

It is a separate server that imports nothing of ours, so that it cannot share our misreadings.
"""
