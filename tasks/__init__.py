"""Celery: the app, the tasks, and the bridge from its threads to the process's event loop."""
