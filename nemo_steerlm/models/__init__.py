"""The NeMo model classes: what the project exists for."""
